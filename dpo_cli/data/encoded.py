"""Rows as token ids: one, and many in columns, so that a large dataset is a few bytes a token, in memory or on the disk.

0.ids      token ids of all prompts, one after another; 1.ids those of the chosen responses, ...    4 bytes a token
0.ends     0, and where each of them ends                                                           8 bytes a row
marks      CUT and PARTED                                                                           1 byte a row
prompts    a hash of the prompt                                                                     8 bytes a row
rows       the rows as JSON, one after another, and where each ends: only on the disk
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

from dpo_cli.data.rows import Row, row_of_json, row_to_json
from dpo_cli.storage.digests import sha256

CUT, PARTED = 1, 2  # bits of a mark
ROWS = "rows"
PROMPT_BYTES = 8
CODES = {"ids": "i", "ends": "q", "marks": "B", "prompts": "q", ROWS: "B"}  # of types, by the last part of a column's name


class Size(NamedTuple):
    """The tokens of a row: of its prompt, and of each response."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def length(self) -> int:
        """Of its longest sequence."""
        return self.prompt + max(self.responses)

    @property
    def response_length(self) -> int:
        """Of all responses."""
        return sum(self.responses)

    @property
    def shared_length(self) -> int:
        """Of the row, with its prompt counted once."""
        return self.prompt + sum(self.responses)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row. A response is scored after the prompt; it includes what the template adds at its end.

    A pair has two responses, chosen and rejected; a demonstration has one.
    """

    row: Row
    prompt_ids: list[int]
    responses: tuple[list[int], ...]
    is_cut: bool = False  # whether the start of the prompt, or the end of a text without a prompt, was cut
    parts_early: bool = False  # whether the prompt is rendered differently before a response

    @property
    def chosen_ids(self) -> list[int]:
        return self.responses[0]

    @property
    def rejected_ids(self) -> list[int]:
        return self.responses[1]

    @property
    def size(self) -> Size:
        return Size(len(self.prompt_ids), tuple(map(len, self.responses)))

    @property
    def length(self) -> int:
        return self.size.length

    @property
    def response_length(self) -> int:
        return self.size.response_length

    @property
    def shared_length(self) -> int:
        return self.size.shared_length


class EncodedRows(Sequence[Encoded]):
    """Rows of one kind, in columns. Each is made when it is asked for."""

    def __init__(self, rows: Sequence[Row], columns: Mapping[str, memoryview], digests: Mapping[str, str]) -> None:
        """`digests` are the SHA-256 of the columns."""
        self.rows, self.digests, self._columns = rows, digests, columns
        self.pieces = sum(name.endswith(".ids") for name in columns)  # of a row: the prompt, and each response

    @classmethod
    def of(cls, rows: Iterable[Encoded]) -> EncodedRows:
        """In memory."""
        growing, given = Growing(), list(rows)
        growing.add(Chunk.of(given), [row.row for row in given])
        return growing.done()

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | Sequence[Encoded]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        prompt, *responses = self.ids(place)
        mark = self._columns["marks"][place]
        return Encoded(self.rows[place], prompt, tuple(responses), bool(mark & CUT), bool(mark & PARTED))

    def ids(self, place: int) -> list[list[int]]:
        """The token ids of a row: of its prompt, and of each response."""
        columns = (self.column(piece) for piece in range(self.pieces))
        return [ids[ends[place] : ends[place + 1]].tolist() for ids, ends in columns]

    def column(self, piece: int) -> tuple[memoryview, memoryview]:
        """The ids of a piece of all rows, one after another, and where each ends, after a 0."""
        return self._columns[f"{piece}.ids"], self._columns[f"{piece}.ends"]

    def sizes(self) -> Iterator[Size]:
        """The size of each row."""
        ends = (self._columns[f"{piece}.ends"] for piece in range(self.pieces))
        for prompt, *responses in zip(*([end - start for start, end in pairwise(of_piece)] for of_piece in ends), strict=True):
            yield Size(prompt, tuple(responses))

    @property
    def token_digests(self) -> list[str]:
        """The digests of the columns of token ids."""
        return [digest for name, digest in self.digests.items() if name[0].isdigit()]

    @property
    def prompts(self) -> int:
        """The number of different prompts."""
        return len(set(self._columns["prompts"]))

    @property
    def cut(self) -> int:
        """The number of rows that are cut."""
        return sum(mark & CUT > 0 for mark in self._columns["marks"])

    @property
    def parted(self) -> int:
        """The number of rows whose prompt is rendered differently before a response."""
        return sum(mark & PARTED > 0 for mark in self._columns["marks"])


@dataclass
class Chunk:
    """Some encoded rows as another process returns them. `kept` are their places among the rows that it was given."""

    kept: array[int] = field(default_factory=lambda: array("q"))
    ids: list[array[int]] = field(default_factory=list)  # of each piece
    sizes: list[array[int]] = field(default_factory=list)
    marks: bytearray = field(default_factory=bytearray)

    @classmethod
    def of(cls, rows: Sequence[Encoded | None]) -> Chunk:
        """Of the rows that are not None."""
        chunk = cls()
        for place, row in enumerate(rows):
            if row is None:
                continue
            pieces = (row.prompt_ids, *row.responses)
            if not chunk.ids:
                chunk.ids, chunk.sizes = [array("i") for _ in pieces], [array("q") for _ in pieces]
            for ids, sizes, piece in zip(chunk.ids, chunk.sizes, pieces, strict=True):
                ids.extend(piece)
                sizes.append(len(piece))
            chunk.kept.append(place)
            chunk.marks.append(CUT * row.is_cut | PARTED * row.parts_early)
        return chunk

    def row_sizes(self) -> list[Size]:
        """The size of each row."""
        return [Size(prompt, tuple(responses)) for prompt, *responses in zip(*self.sizes, strict=True)]

    def taken(self, wanted: Sequence[int]) -> Chunk:
        """These of the kept rows."""
        if len(wanted) == len(self.kept):
            return self
        ends = [[0, *accumulate(sizes)] for sizes in self.sizes]
        some = Chunk(ids=[array("i") for _ in self.ids], sizes=[array("q") for _ in self.sizes])
        for at in wanted:
            for piece, of_piece in enumerate(ends):
                some.ids[piece].extend(self.ids[piece][of_piece[at] : of_piece[at + 1]])
                some.sizes[piece].append(self.sizes[piece][at])
            some.kept.append(self.kept[at])
            some.marks.append(self.marks[at])
        return some


class NotKept(Exception):
    """Rows cannot be written: a full disk, or a row that JSON does not have."""


@contextmanager
def keeping() -> Iterator[None]:
    """Within, an error is about what is written."""
    try:
        yield
    except (OSError, TypeError) as error:
        raise NotKept(str(error)) from error


class Growing:
    """Rows that come in chunks, in their order: in memory, or in the files of a `folder`."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder, self._rows = folder, list[Row]()
        self._columns: dict[str, _Column] = {}
        for name in ("marks", "prompts", *((ROWS, f"{ROWS}.ends") if folder else ())):
            self._column(name)

    def add(self, chunk: Chunk, rows: Sequence[Row]) -> None:
        """Add a chunk that was made of `rows`; `NotKept` if a file cannot be written."""
        with keeping():
            self._add(chunk, rows)

    def _add(self, chunk: Chunk, rows: Sequence[Row]) -> None:
        kept = [rows[place] for place in chunk.kept]
        for piece, (ids, sizes) in enumerate(zip(chunk.ids, chunk.sizes, strict=True)):
            self._column(f"{piece}.ids").write(ids)
            self._column(f"{piece}.ends").write_ends(sizes)
        self._column("marks").write(chunk.marks)
        self._column("prompts").write(b"".join(map(_hash_of_prompt, kept)))
        if self._folder is None:
            self._rows += kept
            return
        texts = [json.dumps(row_to_json(row)).encode() for row in kept]
        self._column(ROWS).write(b"".join(texts))
        self._column(f"{ROWS}.ends").write_ends(list(map(len, texts)))

    def done(self) -> EncodedRows:
        """All rows that were added; `NotKept` if a file cannot be written to its end."""
        with keeping():
            columns = {name: column.view() for name, column in self._columns.items()}
        return EncodedRows(_StoredRows(columns) if self._folder else self._rows, columns, self.digests)

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of each column."""
        return {name: column.sha256.hexdigest() for name, column in sorted(self._columns.items())}

    def _column(self, name: str) -> _Column:
        if name not in self._columns:
            self._columns[name] = _Column(name, self._folder)
        return self._columns[name]


class _Column:
    """Values that are written one after another, and their SHA-256."""

    def __init__(self, name: str, folder: Path | None) -> None:
        self._name, self._folder, self._end = name, folder, 0
        self._file: BinaryIO = (folder / name).open("wb") if folder else io.BytesIO()
        self.sha256 = hashlib.sha256()
        if name.endswith(".ends"):
            self.write(array("q", [0]))

    def write(self, values: bytes | bytearray | array[int]) -> None:
        self._file.write(values)
        self.sha256.update(values)

    def write_ends(self, sizes: Sequence[int]) -> None:
        _, *ends = accumulate(sizes, initial=self._end)
        self._end = ends[-1] if ends else self._end
        self.write(array("q", ends))

    def view(self) -> memoryview:
        """All values."""
        if isinstance(self._file, io.BytesIO):
            return _cast(self._name, self._file.getbuffer())
        self._file.close()
        assert self._folder is not None
        return _mapped(self._folder / self._name)


def check_columns(folder: Path, digests: Mapping[str, str]) -> None:
    """`ValueError` if a file of a folder is not what was written, `OSError` if one is missing."""
    for name, digest in digests.items():
        if sha256(folder / name) != digest:
            raise ValueError(f"{folder / name} has changed")


def read_columns(folder: Path, digests: Mapping[str, str]) -> EncodedRows:
    """The rows in the files of a folder."""
    columns = {name: _mapped(folder / name) for name in digests}
    return EncodedRows(_StoredRows(columns), columns, digests)


def _mapped(file: Path) -> memoryview:
    """The values of a file, read when they are used."""
    with file.open("rb") as opened:
        is_empty = os.fstat(opened.fileno()).st_size == 0  # which cannot be mapped
        return _cast(file.name, memoryview(b"" if is_empty else mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)))


def _cast(name: str, buffer: memoryview) -> memoryview:
    code: Any = CODES[name.rpartition(".")[2]]
    return buffer.cast("B").cast(code)


class _StoredRows(Sequence[Row]):
    """The rows in a column of JSON."""

    def __init__(self, columns: Mapping[str, memoryview]) -> None:
        self._texts, self._ends = columns[ROWS], columns[f"{ROWS}.ends"]

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        return row_of_json(json.loads(bytes(self._texts[self._ends[place] : self._ends[place + 1]])))


def _hash_of_prompt(row: Row) -> bytes:
    return hashlib.blake2b(row.prompt_key.encode("utf-8", "surrogatepass"), digest_size=PROMPT_BYTES).digest()
