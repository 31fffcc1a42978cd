"""Files of rows: JSON lines, JSON lists, tables, Parquet; each is read as a stream of rows with their places.

A place is a physical line, or the number of the row if rows have no own lines (Parquet, a JSON list with two rows on one
line). Text compressed with gzip is decompressed while it is read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import shlex
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NoReturn, TypeVar, cast

from dpo_cli import errors
from dpo_cli.data import folders
from dpo_cli.data.messages import BadRow, bounded, without_padding
from dpo_cli.errors import Problem, Severity

T = TypeVar("T")
Rows = Iterator[tuple[int, Callable[[], object]]]  # place, and a function that parses the row or raises BadRow

MAX_LINE_BYTES = 1 << 26  # a row of 64 MiB is not a pair
MAX_LIST_BYTES = 1 << 30  # a JSON list is held in memory as a whole, and gzip may expand a file a thousand times
PIECE_BYTES = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")

UNEXPECTED = (TypeError, AttributeError, KeyError, OverflowError, RecursionError)  # raised by a value of an unexpected type
GZIPPED = b"\x1f\x8b"  # first bytes of a gzip file
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)  # raised when a damaged one is read


def rows_of(path: str, reader: Callable[[str], Rows] | None = None) -> Rows:
    """The rows of one readable file, by the reader of its suffix or by another one."""
    place = 0
    try:
        for place, parse_row in (reader or READERS[folders.kind(path)])(path):
            yield place, parse_row
    except DAMAGED as error:  # the rows before the damage stay
        yield place + 1, partial(_refuse, "row-not-gzip", f"the gzip file is damaged from here on: {error}")


def read_rows(
    path: str,
    read: Callable[[object, int], T],
    reader: Callable[[str], Rows] | None = None,
    only: Container[int] | None = None,
) -> Iterator[tuple[int, T | BadRow]]:
    """Each row of a readable file as `read` returns it, or the fault of the row, with its place: no row stops the reading.

    With `only`, all rows on other places are left out.
    """
    for place, parse_row in rows_of(path, reader):
        if only is not None and place not in only:
            continue
        try:
            yield place, read(bounded(parse_row()), place)
        except BadRow as error:
            yield place, error
        except UNEXPECTED as error:
            detail = f"{type(error).__name__}: {error}"[:80]
            yield place, BadRow("row-unreadable", "a value has an unexpected type or size", detail)


def opened(path: str) -> BinaryIO:
    """A file opened for reading, decompressed if its first bytes say gzip."""
    return cast(BinaryIO, gzip.open(path)) if _is_gzip(path) else Path(path).open("rb")


def _is_gzip(path: str) -> bool:
    with Path(path).open("rb") as file:
        return file.read(len(GZIPPED)) == GZIPPED


def lines_of(path: str, parse: Callable[[bytes], object]) -> Rows:
    """Each non-blank line as a row, without byte order marks."""
    with opened(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):  # skip the rest without keeping it
                    line = file.readline(MAX_LINE_BYTES)
                yield number, partial(_refuse, "row-too-long", f"the line has more than {MAX_LINE_BYTES >> 20} MiB")
                continue
            line = line.removeprefix(codecs.BOM_UTF8)  # also inside a file that was joined from others
            if line and not line.isspace():
                yield number, partial(parse, line)


def unit(path: str) -> str:
    """What places in a file count: "line" or "row"."""
    kind = folders.kind(path)
    if kind == ".json" and (file := Path(path)).is_file():
        state = file.stat()
        return _unit_of_list(path, state.st_mtime_ns, state.st_size)
    return "row" if kind == ".parquet" else "line"


def about_rows(
    severity: Severity, code: str, reason: str, fix: str, key: str | None, file: str, lines: Sequence[int]
) -> Problem:
    """A problem of these rows of a file, with their places as lines or rows."""
    return errors.about_rows(severity, code, reason, fix, key, file, lines, unit(file))


def _json_lines(path: str) -> Rows:
    return lines_of(path, _parse_line)


def _refuse(code: str, reason: str, fix: str = "") -> NoReturn:
    raise BadRow(code, reason, fix=fix)


def _parse_line(line: bytes) -> object:
    try:
        return _DECODER.decode(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        raise BadRow("row-not-utf8", "not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("row-not-json", "not valid JSON", where) from error


def _no_duplicates(items: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(items)
    if len(row) < len(items):
        raise BadRow("row-duplicate-key", "a key is given twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates)


def _json_list(path: str) -> Rows:
    """The rows of a JSON list. No row is found after a text that cannot be parsed."""
    try:
        text = _whole(path)
    except UnicodeDecodeError as error:
        yield error.object.count(b"\n", 0, error.start) + 1, partial(_refuse, "row-not-utf8", "not valid UTF-8")
        return
    if text is None:
        reason = f"the JSON list has more than {MAX_LIST_BYTES >> 20} MiB: write it as .jsonl, one row per line"
        yield 1, partial(_refuse, "row-too-long", reason)
        return
    starts, fault = _row_starts(text)
    lines = _lines_at(text, starts)
    places = range(1, len(lines) + 1) if _share_a_line(lines) else lines
    for place, start in zip(places[: len(places) - (fault is not None)], starts, strict=False):
        yield place, partial(_parse_at, text, start)
    if fault is not None and fault[0] == "dataset-not-list":
        yield places[-1], partial(_refuse, fault[0], *_object_of_rows(path, text, fault[1]))
    elif fault is not None:
        yield places[-1], partial(_refuse, *fault)


def _whole(path: str) -> str | None:
    """The text of a file, None if it is too long."""
    with opened(path) as file:
        pieces = islice(iter(partial(file.read, PIECE_BYTES), b""), MAX_LIST_BYTES // PIECE_BYTES)
        data = b"".join(pieces)
        return None if file.read(1) else data.decode("utf-8-sig")


def _row_starts(text: str) -> tuple[array[int], tuple[str, str] | None]:
    """The starts of the rows of a JSON list; and the fault of the last one, if it and all after it cannot be read."""
    starts, decoder = array("q"), json.JSONDecoder()
    at = _behind_space(text, 0)
    if text[at : at + 1] != "[":
        rows_of_lines = text[at : at + 1] == "{" and text.count("\n{", at) > 0
        reason = (
            "the file has one object per line: rename it to .jsonl" if rows_of_lines else "the file is not a JSON list of rows"
        )
        return array("q", [0]), ("dataset-not-list", reason)
    at = _behind_space(text, at + 1)
    while text[at : at + 1] != "]":
        starts.append(at)
        try:
            end = _behind_space(text, decoder.raw_decode(text, at)[1])
        except (ValueError, RecursionError):
            return starts, ("row-not-json", "not valid JSON, so the rest cannot be read")
        if text[end : end + 1] not in (",", "]"):
            starts.append(end)
            return starts, ("row-not-json", "a comma or the closing bracket is missing, so the rest cannot be read")
        at = _behind_space(text, end + 1) if text[end] == "," else end
    if (end := _behind_space(text, at + 1)) < len(text):
        starts.append(end)
        return starts, ("row-not-json", "the list ends here, so the rest cannot be read")
    return starts, None


def _object_of_rows(path: str, text: str, reason: str) -> tuple[str, str]:
    """(the content of a JSON file that is not a list, a command that converts it); only the reason if it holds no rows."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return reason, ""
    parts = whole if isinstance(whole, dict) else {}
    held = [name for name, part in parts.items() if _is_rows(part) and re.fullmatch(r"[\w .-]+", name)]
    kinds, rows = {type(part) for part in parts.values()}, "rows"
    if held:
        rows = next((name for name in held if name.startswith("train")), held[0])
        what, expression = f"an object with lists of rows: {', '.join(held)}", f"t[{json.dumps(rows)}]"
    elif kinds == {list} and len({len(part) for part in parts.values()}) == 1 and not _holds_messages(parts):
        what, expression = "an object with a list for each column", "[dict(zip(t, r)) for r in zip(*t.values())]"
    elif {"columns", "data"} <= parts.keys() and isinstance(parts["data"], list):
        what, expression = "a pandas table (split)", '[dict(zip(t["columns"], r)) for r in t["data"]]'
    elif kinds == {dict} and all(name.isdecimal() for name in parts):
        what, expression = "an object with rows by number", "[*t.values()]"
    elif kinds == {dict} and all(number.isdecimal() for part in parts.values() for number in part):
        columns = "zip(*(c.values() for c in t.values()))"
        what, expression = "a pandas table (by columns)", f"[dict(zip(t, r)) for r in {columns}]"
    else:
        return reason, ""
    opening = "import gzip, json, sys; t = json.load(gzip.open(" if _is_gzip(path) else "import json, sys; t = json.load(open("
    target = str(Path(path).with_name(f"{Path(path).name.partition('.json')[0]}-{rows.replace(' ', '-')}.json"))
    code = f'{opening}sys.argv[1], "rb")); print(json.dumps({expression}), file=open(sys.argv[2], "x"))'
    return f"the file is not a JSON list of rows, but {what}", python_writes(target, code, path)


def python_writes(target: str, code: str, source: str) -> str:
    """The fix that names `target`, which the code writes: its arguments are the source and the target.

    The code opens the target with "x" to overwrite nothing, and has no single quote, so that it is readable in a shell.
    """
    return f"`python -c {shlex.join([code, source, target])}` converts it: name {target}"


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value) and not _is_said(value)


def _holds_messages(row: Mapping[str, Sequence[object]]) -> bool:
    return any(_is_said(value) for value in row.values())


def _is_said(value: Sequence[object]) -> bool:
    """Whether a list holds messages, so that the object around it is a row."""
    return any(isinstance(part, dict) and not {"role", "from"}.isdisjoint(part) for part in value)


def _behind_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr] # it also matches the empty text


def _lines_at(text: str, positions: Iterable[int]) -> array[int]:
    """The line of each position; the positions are in ascending order."""
    lines, line, counted = array("q"), 1, 0
    for position in positions:
        line, counted = line + text.count("\n", counted, position), position
        lines.append(line)
    return lines


def _share_a_line(lines: Sequence[int]) -> bool:
    return len(set(lines)) < len(lines)


@lru_cache(maxsize=64)
def _unit_of_list(path: str, changed_at: int, size: int) -> str:
    """`unit` of a JSON list, for one state of a file."""
    try:
        text = _whole(path) or ""
    except (UnicodeDecodeError, *DAMAGED):
        return "line"
    return "row" if _share_a_line(_lines_at(text, _row_starts(text)[0])) else "line"


def _parse_at(text: str, start: int) -> object:
    try:
        return _DECODER.raw_decode(text, start)[0]
    except (ValueError, RecursionError) as error:
        raise BadRow("row-not-json", "not valid JSON") from error


def _as_it_is(row: object) -> object:
    return row


def _csv(path: str) -> Rows:
    """The rows of a table with a header; a cell may hold several lines, and a row starts on the line after the previous row.

    The delimiter is the most frequent one of the header: a comma, a semicolon, a tab or a bar.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    with _text(path) as file:
        delimiter = max(",;\t|", key=file.readline(MAX_LINE_BYTES).count)
    with _text(path) as file:
        table = csv.reader(_bounded(file), delimiter=delimiter, strict=True)
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
                yield 1, partial(_refuse, "row-duplicate-key", "the header has a column twice")
                return
            if cells:
                yield line, partial(_parse_cells, header, cells)


def _text(path: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(opened(path), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _bounded(file: io.TextIOBase) -> Iterator[str]:
    """The lines of a table. A line that is too long becomes a cell that is too long, which the parser rejects."""
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) < MAX_LINE_BYTES or line.endswith(("\n", "\r")):
            yield line
            continue
        while line and not line.endswith(("\n", "\r")):
            line = file.readline(MAX_LINE_BYTES)
        yield "x" * (MAX_LINE_BYTES + 1)


def _parse_cells(header: list[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(header):
        raise BadRow("row-not-csv", f"the row has {len(cells)} cells, but the header has {len(header)}")
    if any("\udc80" <= char <= "\udcff" for cell in cells if not cell.isascii() for char in cell):
        raise BadRow("row-not-utf8", "not valid UTF-8")
    return dict(zip(header, cells, strict=True))


def _parquet(path: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, partial(_as_it_is, without_padding(row))
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
