"""Files of rows to `Pair`s, as a stream: every bad row is named, none stops the reading, and no file is held in memory.

A dataset is a file (.jsonl, .json, .csv, .tsv, .parquet), a folder of such files, or a list of those with weights.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dpo_cli.data import hub
from dpo_cli.data.formats import BadRow, Demonstration, Pair, pair_of, shape_of, to_demonstration
from dpo_cli.errors import Problem, Severity, about_rows

Rows = Iterator[tuple[int, Callable[[], Any]]]  # physical line, and what parses the row or raises BadRow

MAX_LINE_BYTES = 1 << 26  # a row of 64 MiB is no pair
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Source:
    """A file, and how often each of its pairs is seen in an epoch; below 1, that share of them."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Dataset:
    """What a pass over the sources found; `load` makes another that keeps the pairs."""

    name: str
    sources: tuple[Source, ...]
    columns: Mapping[str, str] | None
    rows: int = 0
    pairs: int = 0
    prompts: int = 0
    problems: tuple[Problem, ...] = ()
    key: str = "dataset"  # of the config, that names it
    shapes: Mapping[str, int] = field(default_factory=dict)  # rows that are not written as documented, by what is said of them

    def load(self) -> list[Pair]:
        """The usable pairs in the order of their files; a pair of weight 2 stands twice, of weight 0.5 every second stands."""
        kept: list[Pair] = []
        seen: Counter[float] = Counter()  # by weight, so that a folder of small files is weighed as a whole
        for source in self.sources:
            for pair in stream([source], self.columns):
                if isinstance(pair, Pair):
                    seen[source.weight] += 1
                    due = math.floor(seen[source.weight] * source.weight + 1e-9) - math.floor(
                        (seen[source.weight] - 1) * source.weight + 1e-9
                    )
                    kept += [pair] * due
        return kept

    def to_json(self) -> dict[str, Any]:
        return {"file": self.name, "rows": self.rows, "pairs": self.pairs, "prompts": self.prompts}


class Observer(Protocol):
    """Looks at every pair of a pass, and says at its end what it found."""

    def see(self, pair: Pair, prompt_key: str) -> None: ...


@dataclass(frozen=True)
class Bad:
    """A row that is no pair."""

    file: str
    line: int
    code: str
    reason: str
    detail: str  # what is particular to this row


def sources_of(value: str | Sequence[str | Mapping[str, Any]]) -> tuple[Source, ...]:
    """The files that a config's value names: a path or a list of paths and {"path", "weight"}; a folder is its files."""
    return tuple(Source(file, weight) for path, weight in _entries(value) for file in _files(path))


def _entries(value: str | Sequence[str | Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(path, weight) of each entry, its ~ expanded."""
    entries = [value] if isinstance(value, str) else value
    given = [(entry, 1.0) if isinstance(entry, str) else (entry["path"], entry.get("weight", 1.0)) for entry in entries]
    return [(str(Path(path).expanduser()) if path.startswith("~/") else path, weight) for path, weight in given]


def hub_ids(values: Mapping[str, Any]) -> list[str]:
    """The datasets of a valid config that are on the hub."""
    named = [values[key] for key in ("dataset", "eval_dataset") if values.get(key)]
    return [path for value in named for path, _ in _entries(value) if hub.is_hub_id(path)]


def unreadable(value: str | Sequence[str | Mapping[str, Any]], key: str) -> list[Problem]:
    """Why what `key` of a config names cannot be read at all; such a problem has its place in the config."""
    found = (_unreadable(Path(source.path), key) for source in sources_of(value))
    return [problem for problem in found if problem is not None]


def read(
    value: str | Sequence[str | Mapping[str, Any]],
    skip: bool = False,
    key: str = "dataset",
    columns: Mapping[str, str] | None = None,
    observers: Sequence[Observer] = (),
    demonstrations: bool = False,
) -> Dataset:
    """One pass over what `key` of a config names. Problems are returned, never raised; bad rows are warnings with `skip`.

    A problem of a file as a whole has no place: it belongs to the config that names it. With `demonstrations` the rows are
    those of sft, of which observers see nothing.
    """
    sources = sources_of(value)
    name = sources[0].path if len(sources) == 1 else f"{len(sources)} files"
    data = Dataset(name, sources, columns, key=key)
    whole = unreadable(value, key)
    readable = [source for source in sources if _unreadable(Path(source.path), key) is None]
    bad: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    details: dict[tuple[str, str, str], str] = {}  # of the first such row
    shapes: Counter[str] = Counter()
    prompts: set[int] = set()
    rows = 0
    for row in _demonstrations(readable) if demonstrations else stream(readable, columns, shapes):
        rows += 1
        if isinstance(row, Bad):  # kept, so that one pass names them all
            bad[row.file, row.code, row.reason].append(row.line)
            details.setdefault((row.file, row.code, row.reason), f" (line {row.line}, {row.detail})" if row.detail else "")
            continue
        prompt_key = row.prompt_key
        prompts.add(hash(prompt_key))
        if isinstance(row, Pair):
            for observer in observers:
                observer.see(row, prompt_key)
    severity: Severity = "warning" if skip else "error"
    fix = "left out of the training" if skip else 'correct or delete what is named, or set "on_bad_rows": "skip"'
    problems = [
        about_rows(severity, code, reason + details[file, code, reason], fix, key, file, lines)
        for (file, code, reason), lines in bad.items()
    ]
    pairs = rows - sum(map(len, bad.values()))
    problems = [*whole, *problems]
    if not pairs and readable and not any(problem.severity == "error" for problem in problems):
        problems.append(Problem("error", "dataset-empty", f"{name} holds no usable pair", "add pairs", key, name))
    for says, count in shapes.items():
        fix = 'say what the columns are called with "columns" if that is not meant'
        problems.append(Problem("hint", "rows-read-as", f"{count} rows are read as {says}", fix, key, name))
    return replace(data, rows=rows, pairs=pairs, prompts=len(prompts), problems=tuple(problems), shapes=shapes)


def stream(
    sources: Sequence[Source], columns: Mapping[str, str] | None = None, shapes: Counter[str] | None = None
) -> Iterator[Pair | Bad]:
    """The rows of the sources one after the other; `shapes` counts those that are not written as documented."""
    for source in sources:
        for line, parse_row in rows_of(source.path):
            try:
                shape, row = shape_of(parse_row(), columns)
                pair = pair_of(shape, row, line, source.path)
            except BadRow as error:
                yield Bad(source.path, line, error.code, error.reason, error.detail)
                continue
            if shapes is not None and shape.says:
                shapes[shape.says] += 1
            yield pair


def _demonstrations(sources: Sequence[Source]) -> Iterator[Demonstration | Bad]:
    for source in sources:
        for line, parse_row in rows_of(source.path):
            try:
                yield to_demonstration(parse_row(), line, source.path)
            except BadRow as error:
                yield Bad(source.path, line, error.code, error.reason, error.detail)


def rows_of(path: str) -> Rows:
    """The rows of one readable file."""
    return READERS[Path(path).suffix.lower()](path)


def _files(path: str) -> list[str]:
    """The files of a folder in the order of their names, or of a dataset of the hub; a file itself."""
    if hub.is_hub_id(path):
        return hub.cached(path) or [path]
    folder = Path(path)
    if folder.suffix.lower() in READERS or not os.path.exists(path) or not folder.is_dir():
        return [path]
    return [str(file) for file in sorted(folder.iterdir()) if file.suffix.lower() in READERS and file.is_file()] or [path]


def _unreadable(path: Path, key: str) -> Problem | None:
    def problem(code: str, message: str, fix: str) -> Problem:
        return Problem("error", code, message, fix, key)

    if not os.path.exists(path):
        if hub.is_hub_id(str(path)):
            message = f"{path} is not here yet: `dpo train` asks the hub for it"
            fix = f"`hf download --repo-type dataset {path}` fetches it now; a local file has a suffix"
            return Problem("warning", "dataset-on-hub", message, fix, key)
        siblings = [file.name for file in path.parent.iterdir()] if os.path.exists(path.parent) and path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, 1, cutoff=0.75)
        fix = f"did you mean {path.parent / near[0]}?" if near else f'check the path in "{key}"'
        return problem("dataset-missing", f"there is no file {path}", fix)
    if path.suffix.lower() not in READERS:
        what = "holds no" if path.is_dir() else "is not a"
        fix = 'use a .jsonl file: one {"prompt": ..., "chosen": ..., "rejected": ...} object a line'
        return problem("dataset-format", f"{path} {what} {', '.join(READERS)} file", fix)
    if not path.is_file():  # a folder of that name, or a pipe, which could not be read twice
        return problem("dataset-unreadable", f"{path} is not a file", "name a readable file")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:  # a file that may not be read: told as that
        return problem("dataset-unreadable", f"cannot read {path}: {error.strerror}", "name a readable file")
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return problem("dataset-utf16", f"{path} is UTF-16", "save it as UTF-8")
    if path.suffix.lower() == ".parquet" and start != b"PAR1":
        return problem("dataset-damaged", f"{path} is not a Parquet file", "download or write it again")
    return None


def _json_lines(path: str) -> Rows:
    with Path(path).open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):  # step over the rest without keeping it
                    line = file.readline(MAX_LINE_BYTES)
                yield number, partial(_refuse, "row-too-long", f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
            elif not line.isspace():
                yield number, partial(_parse_line, line, number)


def _refuse(code: str, reason: str) -> Any:
    raise BadRow(code, reason)


def _parse_line(line: bytes, number: int) -> Any:
    if number == 1 and line.startswith(codecs.BOM_UTF8):
        raise BadRow("row-bom", "the file starts with a byte order mark: save it as UTF-8 without BOM")
    try:
        return _DECODER.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise BadRow("row-not-utf8", "not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("row-not-json", "not valid JSON", where) from error


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        raise BadRow("row-duplicate-key", "a key stands twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _json_list(path: str) -> Rows:
    """The rows of a JSON list, each with the line it starts on. After what cannot be parsed no row can be found."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        yield error.object.count(b"\n", 0, error.start) + 1, partial(_refuse, "row-not-utf8", "not valid UTF-8")
        return
    at, line, counted = _SPACE.match(text, 0).end(), 1, 0  # type: ignore[union-attr]
    closed = text[at : at + 1] != "["
    if closed:
        rows_of_lines = text[at : at + 1] == "{" and text.count("\n{", at) > 0
        reason = "one object a line: such a file is called .jsonl" if rows_of_lines else "the file is not a JSON list of rows"
        yield 1, partial(_refuse, "dataset-not-list", reason)
    at += 1
    while not closed:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            row, at = _DECODER.raw_decode(text, at)
            yield line, partial(_as_it_is, row)
        except BadRow as error:  # a duplicate key: the decoder does not say where the row ends
            yield line, partial(_refuse, error.code, error.reason)
            try:
                at = json.JSONDecoder().raw_decode(text, at)[1]
            except (ValueError, RecursionError):  # and after the row there is more that is wrong
                return
        except (ValueError, RecursionError):
            yield line, partial(_refuse, "row-not-json", "not valid JSON, so what follows cannot be read")
            return
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] not in (",", "]"):
            line += text.count("\n", counted, at)
            yield (
                line,
                partial(_refuse, "row-not-json", "a comma or the closing bracket is missing, so what follows cannot be read"),
            )
            return
        at += text[at] == ","


def _as_it_is(row: Any) -> Any:
    return row


def _csv(path: str) -> Rows:
    """The rows of a table with a header; a cell may hold several lines, and a row starts on the line after the last one.

    Cells are divided by what divides the header most often: a comma, a semicolon, a tab or a bar.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape") as file:
        header_line = file.readline(MAX_LINE_BYTES)
    delimiter = max(",;\t|", key=header_line.count)
    with Path(path).open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            line = table.line_num + 1
            try:
                header = header or next(table)
                line = table.line_num + 1
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, partial(_refuse, "row-not-csv", f"not valid CSV: {error}")
                continue
            if len(set(header)) < len(header):
                yield 1, partial(_refuse, "row-duplicate-key", "the header names a column twice")
                return
            if cells:
                yield line, partial(_parse_cells, header, cells)


def _parse_cells(header: list[str], cells: list[str]) -> Any:
    if len(cells) != len(header):
        raise BadRow("row-not-csv", f"{len(cells)} cells under a header of {len(header)}")
    if any("\udc80" <= char <= "\udcff" for cell in cells if not cell.isascii() for char in cell):
        raise BadRow("row-not-utf8", "not valid UTF-8")
    return {name: _maybe_messages(cell) for name, cell in zip(header, cells, strict=True)}


def _maybe_messages(cell: str) -> Any:
    """A cell that is a JSON list of messages, as tables hold them, or the text itself."""
    if cell.startswith("[{"):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            if re.match(r"\[\{'(role|content|from|value)'", cell):  # as pandas writes a list
                raise BadRow("row-not-csv", "a cell holds messages as Python writes them; write them as JSON") from None
            return cell  # text that happens to start like that
    return cell


def _parquet(path: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, partial(_as_it_is, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield (
            number + 1,
            partial(_refuse, "row-not-parquet", f"the Parquet file cannot be read from here on: {str(error).splitlines()[0]}"),
        )


READERS: Mapping[str, Callable[[str], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
