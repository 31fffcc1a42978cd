"""JSON text to values and the position of each, with comments and trailing commas allowed.

No library gives all of it at once: comments, trailing commas, positions, duplicate keys, NaN refused, and no recursion, so
that a file of 100,000 opening brackets is an error message and not a crash. Hence this scanner of one loop.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from dpo_cli.errors import Problem

Path = tuple[str | int, ...]

MAX_DEPTH = 64
MAX_DIGITS = 400  # beyond any float; Python itself refuses to convert integers of more than 4,300 digits
_GAP = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_WORD = re.compile(r"-?[A-Za-z0-9_.+][A-Za-z0-9_.+\-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Document:
    """A parsed document: its value, where each value starts, and all that is wrong with the text."""

    value: Any
    positions: dict[Path, tuple[int, int]]
    problems: tuple[Problem, ...]


class _Stop(Exception):
    """The text cannot be read further; the reason is among the problems."""


class _Scanner:
    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, 0
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.root: list[Any] = []  # holds the document's value

    def document(self) -> None:
        """Read values into their containers until the document is complete; open containers are on a stack."""
        stack: list[tuple[Any, Path]] = [(self.root, ())]
        while True:
            container, path = stack[-1]
            if container is self.root and self.root:
                if char := self.peek():
                    self.stop("json-syntax", f"text after the end of the document: {char!r}", "delete it")
                return
            if container is not self.root and self.take("}" if isinstance(container, dict) else "]"):
                stack.pop()
                self.separator(stack[-1][0])
                continue
            key = self.key(container) if isinstance(container, dict) else len(container)
            where = () if container is self.root else (*path, key)
            value = self.value(where)
            if isinstance(container, dict):
                container[key] = value
            else:
                container.append(value)
            if not isinstance(value, dict | list):
                self.separator(container)
            elif len(stack) <= MAX_DEPTH:
                stack.append((value, where))
            else:
                self.stop("json-depth", f"nested deeper than {MAX_DEPTH} levels", "a config is flat")

    def key(self, container: dict[str, Any]) -> str:
        if self.peek() != '"':
            message = "expected a key in double quotes" if self.peek() else "the file ends inside an object"
            self.stop("json-syntax", message, 'write "key": value, or close the object with }')
        at = self.at
        key = self.string()
        if not self.take(":"):
            self.stop("json-syntax", f"expected ':' after the key \"{key}\"", 'write "key": value')
        if key in container:
            fix = "keep one of them: other readers silently take the last"
            self.complain("duplicate-key", f'the key "{key}" stands twice', fix, at, key)
        return key

    def value(self, where: Path) -> Any:
        """The scalar at the cursor, or a container that is still to be filled."""
        char = self.peek()
        self.positions[where] = self.position(self.at)
        if char and char in "{[":
            self.at += 1
            return {} if char == "{" else []
        return self.string() if char == '"' else self.word()

    def separator(self, container: Any) -> None:
        """What must follow a complete value in `container`: a comma, or its end."""
        closing = "}" if isinstance(container, dict) else "]"
        if container is not self.root and not self.take(",") and self.peek() != closing:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            fix = "add the comma or bracket"
            self.stop("json-syntax", f"expected ',' or the closing bracket, found {found}", fix)

    def string(self) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            fix = "close it with a double quote; inside, write a newline as \\n and a backslash as \\\\"
            self.stop("json-syntax", "this string is not closed, or holds a raw control character", fix)
        value: str = json.loads(match.group())
        if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            self.stop("json-surrogate", "half of a surrogate pair is not a character", "write the character itself")
        self.at = match.end()
        return value

    def word(self) -> Any:
        """A number or a constant."""
        match = _WORD.match(self.text, self.at)
        word = match.group() if match else self.text[self.at : self.at + 1]
        value: Any
        if word in _CONSTANTS:
            value = _CONSTANTS[word]
        elif word.lstrip("-") in ("NaN", "Infinity"):
            self.stop("json-nan", f"{word} is not a JSON number", "write a finite number")
        elif not _NUMBER.fullmatch(word):
            found = f"found {word[:40]!r}" if word else "the file ends here"
            fix = "strings need double quotes; true, false and null are lower case"
            self.stop("json-syntax", f"expected a value, {found}", fix)
        else:
            value = json.loads(word) if len(word) <= MAX_DIGITS else math.inf
            if math.isinf(value):
                self.stop("json-number", "this number is too large to be represented", "write a smaller number")
        self.at += len(word)
        return value

    def peek(self) -> str:
        """The next character that is not space or comment; empty at the end."""
        match = _GAP.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1]

    def take(self, char: str) -> bool:
        """Step over `char` if it is next."""
        found = self.peek() == char
        self.at += found
        return found

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1."""
        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def complain(self, code: str, message: str, fix: str, at: int, key: str | None = None) -> None:
        line, column = self.position(at)
        self.problems.append(Problem("error", code, message, fix, key, self.file, line, column))

    def stop(self, code: str, message: str, fix: str) -> NoReturn:
        self.complain(code, message, fix, self.at)
        raise _Stop


def parse(text: str, file: str) -> Document:
    """Parse `text`; a syntax error ends the parse (what follows it cannot be trusted), a duplicate key does not."""
    scan = _Scanner(text.removeprefix("\ufeff"), file)
    with suppress(_Stop):
        scan.document()
    return Document(scan.root[0] if scan.root else None, scan.positions, tuple(scan.problems))
