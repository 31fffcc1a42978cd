"""The files that rows stand in: JSON lines, JSON lists, tables, Parquet; each a stream of rows with their physical lines."""

from __future__ import annotations

import codecs
import csv
import difflib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.data import hub
from dpo_cli.data.messages import BadRow, without_padding
from dpo_cli.errors import Problem

Rows = Iterator[tuple[int, Callable[[], Any]]]  # physical line, and what parses the row or raises BadRow

MAX_LINE_BYTES = 1 << 26  # a row of 64 MiB is no pair
_SPACE = re.compile(r"[ \t\r\n]*")


def rows_of(path: str) -> Rows:
    """The rows of one readable file."""
    return READERS[Path(path).suffix.lower()](path)


def fault(path: Path, key: str) -> Problem | None:
    """Why a file that `key` of a config names cannot be read at all."""

    def problem(code: str, message: str, fix: str) -> Problem:
        return Problem("error", code, message, fix, key)

    if not os.path.exists(path):
        if hub.is_hub_id(str(path)) and (splits := hub.splits(repository := str(path).partition(":")[0])):
            wanted = str(path).partition(":")[2]
            what = f"has no split {wanted}" if wanted else "has several splits to train on"
            fix = f'write "{repository}:SPLIT" with one of {", ".join(splits)}'
            return problem("dataset-split", f"{repository} {what}", fix)
        if hub.is_hub_id(str(path)):
            message = f"{path} is not here yet: `dpo train` asks the hub for it"
            repository = str(path).partition(":")[0]
            fix = f"`hf download --repo-type dataset {repository}` fetches it now; a local file has a suffix"
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
