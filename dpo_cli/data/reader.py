"""A file of preference pairs to `Pair`s; every bad row is named, none stops the reading."""

from __future__ import annotations

import codecs
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from dpo_cli.config.reader import parse
from dpo_cli.data.formats import BadRow, Pair, to_pair
from dpo_cli.errors import Problem, Severity, about_rows

Rows = Iterator[tuple[int, Callable[[], Any]]]  # physical line, and what parses the row or raises BadRow


@dataclass(frozen=True)
class Dataset:
    """The usable pairs of a file in its order, and what is wrong with the others."""

    file: str
    pairs: tuple[Pair, ...]
    rows: int
    problems: tuple[Problem, ...]
    key: str = "dataset"  # of the config, that names the file

    @property
    def prompts(self) -> int:
        return len({pair.prompt_key for pair in self.pairs})

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "rows": self.rows, "pairs": len(self.pairs), "prompts": self.prompts}


def unreadable(path: str, key: str) -> list[Problem]:
    """Why the file that `key` of a config names cannot be read at all; such a problem has its place in the config."""
    problem = _unreadable(Path(path))
    return [] if problem is None else [replace(problem, key=key)]


def read(path: str, skip: bool = False, key: str = "dataset") -> Dataset:
    """Read a `.jsonl` (one row a line) or `.json` (a list of rows) file. Problems are returned, never raised.

    A problem of the file as a whole has no place: it belongs to the config that names the file as its `key`.
    Bad rows are errors, or warnings with `skip`.
    """
    if problems := unreadable(path, key):
        return Dataset(path, (), 0, tuple(problems), key)
    rows, problems = _json_list(path) if path.endswith(".json") else (_json_lines(path), [])
    pairs: list[Pair] = []
    bad: dict[tuple[str, str], list[int]] = defaultdict(list)
    count = 0
    for line, parse_row in rows:
        count += 1
        try:
            pairs.append(to_pair(parse_row(), line))
        except BadRow as error:  # kept, so that one pass names them all
            bad[error.code, error.reason].append(line)
    severity: Severity = "warning" if skip else "error"
    fix = "left out of the training" if skip else 'correct or delete what is named, or set "on_bad_rows": "skip"'
    problems += [about_rows(severity, code, reason, fix, key, path, lines) for (code, reason), lines in bad.items()]
    if not pairs and not any(problem.severity == "error" for problem in problems):
        problems += [Problem("error", "dataset-empty", f"{path} holds no usable pair", "add pairs", "dataset", path)]
    return Dataset(path, tuple(pairs), count, tuple(replace(problem, key=key) for problem in problems), key)


def _unreadable(path: Path) -> Problem | None:
    if not os.path.exists(path):
        return Problem("error", "dataset-missing", f"there is no file {path}", 'check the path in "dataset"')
    if path.suffix not in (".jsonl", ".json"):
        fix = 'use a .jsonl file: one {"prompt": ..., "chosen": ..., "rejected": ...} object a line'
        return Problem("error", "dataset-format", f"{path} is not a .jsonl or .json file", fix)
    try:
        path.open("rb").close()
    except OSError as error:  # a directory, or a file that may not be read: told as that
        return Problem("error", "dataset-unreadable", f"cannot read {path}: {error.strerror}", "name a readable file")
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return Problem("error", "dataset-utf16", f"{path} is UTF-16", "save it as UTF-8")
    return None


def _json_lines(path: str) -> Rows:
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, partial(_parse_line, line, number)


def _parse_line(line: bytes, number: int) -> Any:
    if number == 1 and line.startswith(b"\xef\xbb\xbf"):
        raise BadRow("row-bom", "the file starts with a byte order mark: save it as UTF-8 without BOM")
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        raise BadRow("row-not-utf8", "not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow("row-not-json", "not valid JSON") from error


def _no_duplicates(items: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(items)
    if len(row) < len(items):
        raise BadRow("row-duplicate-key", "a key stands twice")
    return row


def _json_list(path: str) -> tuple[Rows, list[Problem]]:
    """The rows of a JSON list with the line each starts on, and what is wrong with the file as a whole."""
    try:
        document = parse(Path(path).read_bytes().decode("utf-8"), path)
    except UnicodeDecodeError:
        return iter(()), [Problem("error", "row-not-utf8", f"{path} is not UTF-8", "save it as UTF-8", "dataset", path)]
    if not isinstance(document.value, list) or document.problems:
        fix = 'write [{"prompt": ..., "chosen": ..., "rejected": ...}, ...], or one object a line in a .jsonl file'
        wrong = Problem("error", "dataset-not-list", f"{path} is not a JSON list of rows", fix, "dataset", path, 1, 1)
        return iter(()), list(document.problems) or [wrong]
    rows = ((document.positions[(i,)][0], partial(_as_it_is, row)) for i, row in enumerate(document.value))
    return rows, []


def _as_it_is(row: Any) -> Any:
    return row
