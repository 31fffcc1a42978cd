"""JSON text to values and the position of each, with comments and trailing commas allowed.

No library gives all of it at once: comments, trailing commas, positions, duplicate keys, NaN refused, and no recursion, so
that a file of 100,000 opening brackets is an error message and not a crash. Hence this scanner of one loop.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from dpo_cli.errors import Problem

Path = tuple[str | int, ...]

MAX_DEPTH = 64
MAX_DIGITS = 400  # beyond any float; Python itself refuses to convert integers of more than 4,300 digits
_GAP = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_SCALAR = re.compile(r"-?[A-Za-z0-9_.+][A-Za-z0-9_.+\-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class Document:
    """A parsed document: its value, where each value starts, and all that is wrong with the text."""

    value: Any
    positions: dict[Path, tuple[int, int]]
    problems: tuple[Problem, ...]


class _Scanner:
    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, 0
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1."""
        from bisect import bisect_right

        line = bisect_right(self.line_starts, offset)
        return line, offset - self.line_starts[line - 1] + 1

    def complain(self, code: str, message: str, fix: str, at: int | None = None, key: str | None = None) -> None:
        line, column = self.position(self.at if at is None else at)
        self.problems.append(Problem("error", code, message, fix, key, self.file, line, column))

    def skip_gap(self) -> None:
        match = _GAP.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def peek(self) -> str:
        self.skip_gap()
        return self.text[self.at : self.at + 1]

    def string(self) -> str | None:
        match = _STRING.match(self.text, self.at)
        if match is None:
            fix = "close it with a double quote; inside, write a newline as \\n and a backslash as \\\\"
            self.complain("json-syntax", "this string is not closed, or holds a raw control character", fix)
            return None
        value: str = json.loads(match.group())
        if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            self.complain("json-surrogate", "half of a surrogate pair is not a character", "write the character itself")
            return None
        self.at = match.end()
        return value

    def scalar(self) -> tuple[bool, Any]:
        """A string, number or constant at the cursor: (whether there is one, its value)."""
        if self.peek() == '"':
            text = self.string()
            return text is not None, text
        match = _SCALAR.match(self.text, self.at)
        word = match.group() if match else self.text[self.at : self.at + 1]
        value: Any
        if word in _CONSTANTS:
            value = _CONSTANTS[word]
        elif word.lstrip("-") in ("NaN", "Infinity"):
            self.complain("json-nan", f"{word} is not a JSON number", "write a finite number")
            return False, None
        elif _NUMBER.fullmatch(word):
            value = json.loads(word) if len(word) <= MAX_DIGITS else float("inf")
            if value in (float("inf"), float("-inf")):
                self.complain("json-number", "this number is too large to be represented", "write a smaller number")
                return False, None
        else:
            found = f"found {word[:40]!r}" if word else "the file ends here"
            fix = "strings need double quotes; true, false and null are lower case; see the column named above"
            self.complain("json-syntax", f"expected a value, {found}", fix)
            return False, None
        self.at += len(word)
        return True, value


def parse(text: str, file: str) -> Document:
    """Parse `text`; a syntax error ends the parse (what follows it cannot be trusted), a duplicate key does not."""
    scan = _Scanner(text.removeprefix("\ufeff"), file)
    root: list[Any] = []
    stack: list[tuple[Any, Path]] = [(root, ())]  # open containers; the root list holds the document
    done = False
    while not done:
        container, path = stack[-1]
        char = scan.peek()
        if isinstance(container, dict) and char != "}":
            key_at = scan.at
            key = scan.string() if char == '"' else None
            if key is None:
                if char != '"':
                    message = "expected a key in double quotes" if char else "the file ends inside an object"
                    scan.complain("json-syntax", message, 'write "key": value, or close the object with }')
                break
            if scan.peek() != ":":
                scan.complain("json-syntax", f"expected ':' after the key \"{key}\"", 'write "key": value')
                break
            scan.at += 1
            if key in container:
                fix = "keep one of them: other readers silently take the last"
                scan.complain("duplicate-key", f'the key "{key}" stands twice', fix, key_at, key)
            child: Path = (*path, key)
        else:
            child = (*path, len(container)) if container is not root else ()
        char = scan.peek()
        if (isinstance(container, dict) and char == "}") or (container is not root and char == "]"):
            scan.at += 1
            stack.pop()
        else:
            scan.positions[child] = scan.position(scan.at)
            if char and char in "{[":
                scan.at += 1
                value: Any = {} if char == "{" else []
                ok = True
            else:
                ok, value = scan.scalar()
            if not ok:
                break
            if isinstance(container, dict):
                container[key] = value
            else:
                container.append(value)
            if isinstance(value, dict | list):
                if len(stack) > MAX_DEPTH:
                    scan.complain("json-depth", f"nested deeper than {MAX_DEPTH} levels", "a config is flat")
                    break
                stack.append((value, child))
                continue
        # After a complete value: a comma, or the end of what it stands in.
        char = scan.peek()
        if len(stack) == 1:
            done = True
            if char:
                scan.complain("json-syntax", f"text after the end of the document: {char!r}", "delete it")
        elif char == ",":
            scan.at += 1
        elif char != ("}" if isinstance(stack[-1][0], dict) else "]"):
            found = repr(char) if char else "the end of the file"
            scan.complain("json-syntax", f"expected ',' or the closing bracket, found {found}", "add the comma or bracket")
            break
    return Document(root[0] if root else None, scan.positions, tuple(scan.problems))
