"""A config as text to values and their positions: JSON, YAML or TOML, by the file name, or by the first line of a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePath

from dpo_cli.config import jsonc
from dpo_cli.config.jsonc import Document
from dpo_cli.errors import Problem

STDIN = "-"
# The first line that is neither empty nor a comment: it shows a file of another format.
_FIRST_LINE = re.compile(r"(?:[ \t\r]*(?:#[^\n]*)?\n)*([^\n]+)")
_FORMATS = {
    "YAML": re.compile(r"---|%YAML|- |[\w-]+[ \t]*:(?:[ \t]|\r?$)"),
    "TOML": re.compile(r"\[\[?[\w.\" -]+\]|[\w.\"-]+[ \t]*="),
}
SUFFIXES = {".yaml": "YAML", ".yml": "YAML", ".toml": "TOML"}


def parse(text: str, file: str) -> Document:
    """Parse a config. Never raises: errors are in the document's problems."""
    named = SUFFIXES.get(PurePath(file).suffix.lower())
    if named is not None:
        return _parser(named)(text, file)
    document = jsonc.parse(text, file)
    other = _first_line_of(text) if document.problems else None
    if other is None:
        return document
    if file == STDIN:
        return _parser(other)(text, file)
    fix = f'rename it, so that it ends in .{other.lower()}; a config that ends in .json is {{ "key": value, ... }}'
    line = text[: _start(text)].count("\n") + 1
    return Document(
        None, {}, (Problem("error", "json-syntax", f"this file is {other}", fix, None, file, line, 1),), complete=False
    )


@dataclass(frozen=True)
class Comment:
    """A line about the next value of a written config."""

    text: str


@dataclass(frozen=True)
class Setting:
    """A key and its value in a written config; one that is not active is commented out."""

    key: str
    value: object
    is_active: bool = True


def written(lines: Iterable[Comment | Setting], file: str) -> str:
    """The text of a config, in the form that the name of its file has."""
    named = SUFFIXES.get(PurePath(file).suffix.lower())
    line_of, sign, indent = _json_line, "//", "  "
    if named is not None:
        module = import_module(f"dpo_cli.config.{named.lower()}_document")
        line_of, sign, indent = module.line_of, "#", ""
    made = []
    for line in lines:
        text = f"{sign} {line.text}" if isinstance(line, Comment) else line_of(line.key, line.value)
        made.append(f"{indent}{f'{sign} {text}' if isinstance(line, Setting) and not line.is_active else text}\n")
    return "".join(made) if named is not None else f"{{\n{''.join(made)}}}\n"


def _json_line(key: str, value: object) -> str:
    return f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},"


def _parser(name: str) -> Callable[[str, str], Document]:
    """Imported late: a JSON config needs no other parser."""
    parser: Callable[[str, str], Document] = import_module(f"dpo_cli.config.{name.lower()}_document").parse
    return parser


def _first_line_of(text: str) -> str | None:
    """The format that the first line shows, if it is not JSON."""
    first = _FIRST_LINE.match(text.removeprefix("\ufeff"))
    return next((name for name, pattern in _FORMATS.items() if first is not None and pattern.match(first.group(1))), None)


def _start(text: str) -> int:
    first = _FIRST_LINE.match(text)
    return first.start(1) if first else 0
