"""Parse TOML text to values and their positions.

Python's tomllib makes the values, and refuses what is not TOML with its place. It gives no places of values: those of keys that
start a line are found here, and a value within another one has the place of that.
"""

from __future__ import annotations

import math
import re
import tomllib
from datetime import date, datetime, time
from typing import Any

from dpo_cli.config import jsonc
from dpo_cli.config.jsonc import Document, Path
from dpo_cli.errors import Problem

_PART = r"(?:[A-Za-z0-9_-]+|\"[^\"\n]*\"|'[^'\n]*')"
_KEY = re.compile(rf"^[ \t]*({_PART}(?:[ \t]*\.[ \t]*{_PART})*)[ \t]*=[ \t]*", re.MULTILINE)
_TABLE = re.compile(rf"^[ \t]*(\[\[?)[ \t]*({_PART}(?:[ \t]*\.[ \t]*{_PART})*)[ \t]*\]\]?", re.MULTILINE)
_AT = re.compile(r"(.*?) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


def parse(text: str, file: str) -> Document:
    """Parse `text`. Never raises: errors are in the document's problems."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = _AT.fullmatch(str(error))
        what, line, column = (found.group(1), found.group(2), found.group(3)) if found else (str(error), None, None)
        end = text.count("\n") + 1
        fix = "keep one of them" if "overwrite" in what else "write key = value, with texts in double quotes and true or false"
        place = int(line or end), int(column or 1)
        return Document(None, {}, (Problem("error", "toml-syntax", what, fix, None, file, *place),), complete=False)
    except RecursionError:
        problem = Problem("error", "json-depth", "values are nested too deep", "a config is flat", None, file, 1, 1)
        return Document(None, {}, (problem,), complete=False)
    positions = _positions(text, values)
    problems: list[Problem] = []
    damaged: set[Path] = set()
    value = _json_value(values, (), positions, file, problems, damaged)
    return Document(value, positions, tuple(problems), frozenset(damaged))


def _positions(text: str, values: dict[str, object]) -> dict[Path, tuple[int, int]]:
    """The places of the values whose keys start a line, by their paths."""
    positions: dict[Path, tuple[int, int]] = {(): (1, 1)}
    counts: dict[Path, int] = {}
    table: Path = ()
    found = sorted((*_TABLE.finditer(text), *_KEY.finditer(text)), key=lambda match: match.start())
    for match in found:
        is_table = match.re is _TABLE
        parts = tuple(part.strip("\"'") for part in re.findall(_PART, match.group(2 if is_table else 1)))
        path: Path = (*(() if is_table else table), *parts)
        if is_table and match.group(1) == "[[":
            counts[path] = counts.get(path, -1) + 1
            path = (*path, counts[path])
        if not _is_at(values, path):  # a line of a text
            continue
        place = match.start(1) if is_table else match.end()
        line = text.count("\n", 0, place) + 1
        where = line, place - (text.rfind("\n", 0, place) + 1) + 1
        for length in range(1, len(path) + 1):
            positions.setdefault(path[:length], where)
        table = path if is_table else table
    return positions


def _is_at(value: Any, path: Path) -> bool:
    """Whether a document has a value at this path."""
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _json_value(
    value: object,
    path: Path,
    positions: dict[Path, tuple[int, int]],
    file: str,
    problems: list[Problem],
    damaged: set[Path],
) -> object:
    """A value as JSON has it: a date as text; a number that is not finite is reported."""
    positions.setdefault(path, positions.get(path[:-1], (1, 1)))
    if isinstance(value, dict):
        return {key: _json_value(part, (*path, key), positions, file, problems, damaged) for key, part in value.items()}
    if isinstance(value, list):
        return [_json_value(part, (*path, place), positions, file, problems, damaged) for place, part in enumerate(value)]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        damaged |= {path}
        message, fix = f"{value} is not a finite number", "write a finite number"
        problems.append(Problem("error", "json-nan", message, fix, str(path[0]), file, *positions[path]))
        return None
    return value


def line_of(key: str, value: object) -> str:
    """A key and its value; of null, which TOML does not have, a comment."""
    name = jsonc.name_text(key)
    return f"# {name} has no value" if value is None else f"{name} = {_text(value)}"


def _text(value: object) -> str:
    if isinstance(value, dict):
        parts = [f"{jsonc.name_text(key)} = {_text(part)}" for key, part in value.items() if part is not None]
        return f"{{ {', '.join(parts)} }}"
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else jsonc.value_text(value)
