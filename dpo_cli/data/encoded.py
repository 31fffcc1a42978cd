"""Rows as token ids: one, and many in one array, so that a large dataset is a few bytes a token.

ids       prompt of row 0 | its responses | prompt of row 1 | ...      4 bytes a token
ends      where each of these pieces ends                              8 bytes a piece
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, overload

from dpo_cli.data.rows import Row


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
    """Rows of one kind. Each is made when it is asked for."""

    def __init__(self, rows: Iterable[Encoded] = ()) -> None:
        self.rows: list[Row] = []
        self._ids, self._ends = array("i"), array("q", [0])
        self._cut, self._parted = bytearray(), bytearray()
        for row in rows:
            self.append(row)

    def append(self, encoded: Encoded) -> None:
        self.rows.append(encoded.row)
        for ids in (encoded.prompt_ids, *encoded.responses):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._cut.append(encoded.is_cut)
        self._parted.append(encoded.parts_early)

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
        prompt, *responses = (self._ids[start:end].tolist() for start, end in self._pieces(place))
        return Encoded(self.rows[place], prompt, tuple(responses), bool(self._cut[place]), bool(self._parted[place]))

    def _pieces(self, place: int) -> Iterator[tuple[int, int]]:
        """Start and end of the prompt and of each response of a row."""
        count = (len(self._ends) - 1) // len(self)
        return pairwise(self._ends[place * count : (place + 1) * count + 1])

    def sizes(self) -> Iterator[Size]:
        """The size of each row."""
        for place in range(len(self)):
            prompt, *responses = (end - start for start, end in self._pieces(place))
            yield Size(prompt, tuple(responses))

    @property
    def cut(self) -> int:
        """The number of rows that are cut."""
        return sum(self._cut)

    @property
    def parted(self) -> int:
        """The number of rows whose prompt is rendered differently before a response."""
        return sum(self._parted)

    def where(self, holds: Callable[[Size], bool]) -> EncodedRows:
        """The rows whose size is of that kind: the same object if these are all."""
        kept = [place for place, size in enumerate(self.sizes()) if holds(size)]
        return self if len(kept) == len(self) else EncodedRows(self[place] for place in kept)
