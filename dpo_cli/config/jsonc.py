"""Parse JSON text to values and their positions; comments and trailing commas are allowed.

No library gives all of this: comments, trailing commas, positions, duplicate keys, NaN rejected, and no recursion, so
that a file of 100,000 opening brackets gives an error message and not a crash. So this is a scanner with one loop.

A problem with one value, key or comma is reported and skipped, so that one reading shows all of them. Where the structure
itself cannot be read, the reading stops.
"""

from __future__ import annotations

import ast
import json
import math
import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from dpo_cli.errors import Problem

Path = tuple[str | int, ...]
Container = list[object] | dict[str, object]

MAX_DEPTH = 64
MAX_PROBLEMS = 100  # a text with more is not JSON
MAX_DIGITS = 400  # more than any float has; Python does not convert integers of more than 4,300 digits
_GAP = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"')
_CLOSED = re.compile(r'"(?:[^"\\\n]|\\[^\n])*"')
_ODD = re.compile(r'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4}).|[\x00-\x1f]|(?<=\\)\\')
_SINGLE_QUOTED = re.compile(r"'[^'\n]*'")
_WORD = re.compile(r"-?[A-Za-z0-9_.+][A-Za-z0-9_.+\-]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_CONSTANTS = {"true": True, "false": False, "null": None}
OTHER_SIGNS = {"#": "a comment starts with //", "\xa0": "this is a no-break space: write a plain space"} | dict.fromkeys(
    "“”„‘’«»", 'write straight double quotes: "'
)
_OTHER_LANGUAGES = dict.fromkeys(("true", "yes", "on"), "true") | dict.fromkeys(("false", "no", "off"), "false")
_OTHER_LANGUAGES |= dict.fromkeys(("none", "null", "nil", "undefined"), "null")


@dataclass(frozen=True)
class Document:
    """A parsed document: its value, the position of each value, and the problems of the text.

    At the paths in `damaged` a value could not be read and is null; `complete` is False if the reading stopped before the
    end.
    """

    value: object
    positions: dict[Path, tuple[int, int]]
    problems: tuple[Problem, ...] = ()
    damaged: frozenset[Path] = frozenset()
    complete: bool = True


class _Stop(Exception):
    """The text cannot be read further; the reason is among the problems."""


class _Scanner:
    def __init__(self, text: str, file: str) -> None:
        self.text, self.file, self.at = text, file, 0
        self.line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.root: list[object] = []  # holds the document's value
        self.damaged: set[Path] = set()
        self.complete = False
        self.last: Path = ()  # the path of the last value
        self.open: list[tuple[Container, Path]] = [(self.root, ())]  # containers that are not closed yet, with their paths

    def document(self) -> None:
        """Read values into their containers until the document is complete."""
        while True:
            container, path = self.open[-1]
            if container is self.root and self.root:
                if char := self.peek():
                    self.stop("json-syntax", f"unexpected text after the end of the document: {char!r}", "delete it")
                self.complete = True
                return
            if container is not self.root and self.take("}" if isinstance(container, dict) else "]"):
                self.open.pop()
                self.separator(self.open[-1][0])
                continue
            key = self.key(container) if isinstance(container, dict) else len(container)
            where = () if container is self.root else (*path, key)
            value = self.value(where)
            if isinstance(container, dict):
                container[str(key)] = value
            else:
                container.append(value)
            if not isinstance(value, dict | list):
                self.separator(container)
            elif len(self.open) <= MAX_DEPTH:
                self.open.append((value, where))
            else:
                self.stop("json-depth", f"values are nested more than {MAX_DEPTH} levels deep", "a config is flat")

    def key(self, container: dict[str, object]) -> str:
        quoted = self.peek() == '"'
        at = self.at
        key = self.string() if quoted else self.unquoted_key()
        if not self.take(":"):
            self.stop("json-syntax", f"expected ':' after the key \"{key}\"", 'write "key": value')
        if key in container:
            fix = "keep one of them: other JSON readers silently use the last one"
            self.complain("duplicate-key", f'the key "{key}" is given twice', fix, at, key)
        return key

    def unquoted_key(self) -> str:
        """A key as other languages write it: reported, and read."""
        char = self.peek()
        if not char:
            self.stop("json-syntax", "the file ends inside an object", "close the object with a }")
        if char in OTHER_SIGNS:
            self.stop("json-syntax", f"found {char!r}", OTHER_SIGNS[char])
        match = _SINGLE_QUOTED.match(self.text, self.at) or _WORD.match(self.text, self.at)
        if match is None:
            message = f"expected a key in double quotes, found {self.peek()!r}"
            self.stop("json-syntax", message, 'write "key": value, or close the object with }')
        key = match.group().strip("'")
        if key.isdigit() and self.text[self.at - 1] == ",":
            message = f"found {key} instead of a key: is it the decimal part of the number before?"
            self.damaged |= {self.last}
            self.stop("json-syntax", message, "write a decimal point, not a comma: 0.1")
        self.complain("json-syntax", f"the key {key} is not in double quotes", f'write "{key}":', self.at)
        self.at = match.end()
        return key

    def value(self, where: Path) -> object:
        """The scalar at the cursor, or an empty container to fill."""
        char = self.peek()
        self.positions[where] = self.position(self.at)
        self.last = where
        if char and char in "{[":
            self.at += 1
            return {} if char == "{" else []
        return self.string(where) if char == '"' else self.word(where)

    def separator(self, container: Container) -> None:
        """Read what follows a complete value in `container`: a comma or its end."""
        closing = "}" if isinstance(container, dict) else "]"
        if container is self.root or self.take(",") or self.peek() == closing:
            return
        char = self.peek()
        if (char and char in "\"'") or char.isalnum():  # the next member: only the comma is missing
            self.complain("json-syntax", f"a comma is missing before {char!r}", "add the comma", self.at)
            return
        found = repr(char) if char else "the end of the file"
        fix = OTHER_SIGNS.get(char, "add the comma or bracket")
        self.stop("json-syntax", f"expected ',' or the closing bracket, found {found}", fix)

    def string(self, where: Path | None = None) -> str:
        match = _STRING.match(self.text, self.at)
        if match is None:
            return self.odd_string(where)
        value: str = json.loads(match.group())
        if any(0xD800 <= ord(char) <= 0xDFFF for char in value):
            self.damage("json-surrogate", "half of a surrogate pair is not a character", "write the character itself", where)
            value = value.encode("utf-8", errors="replace").decode("utf-8")
        self.at = match.end()
        return value

    def odd_string(self, where: Path | None) -> str:
        """A string with an invalid escape or control character: reported at its place, and skipped."""
        start, closed = self.at, _CLOSED.match(self.text, self.at)
        if closed is None:
            fix = "close it with a double quote; write a line break inside a string as \\n"
            self.stop("json-syntax", "this string is not closed on its line", fix)
        odd = _ODD.search(closed.group())
        assert odd is not None  # else _STRING would match
        self.at += odd.start()
        if odd.group().startswith("\\"):
            message = f"{odd.group()} is not a JSON escape"
            self.damage("json-syntax", message, "in a path write / between the folders; write a backslash as \\\\", where)
        else:
            message = f"a string holds a raw control character ({ord(odd.group()):#04x})"
            self.damage("json-syntax", message, "write a space instead, or write the tab as \\t", where)
        self.at = start + len(closed.group())
        return closed.group()[1:-1]

    def word(self, where: Path) -> object:
        """A number or a constant; null for a word that is neither."""
        if quoted := _SINGLE_QUOTED.match(self.text, self.at):
            fix = f"write {json.dumps(quoted.group()[1:-1])}"
            self.damage("json-syntax", "this string is in single quotes", fix, where)
            self.at = quoted.end()
            return None
        match = _WORD.match(self.text, self.at)
        word = match.group() if match else self.text[self.at : self.at + 1]
        if word.isalpha() and self.text[self.at + len(word) : self.at + len(word) + 1] == '"':  # Python's r"..."
            self.complain("json-syntax", f"the prefix {word} before a string is not JSON", f"delete the {word}", self.at)
            self.at += len(word)
            return self.string(where)
        value: object = None
        if word in _CONSTANTS:
            value = _CONSTANTS[word]
        elif word.lstrip("+-") in ("NaN", "Infinity", "nan", "inf"):
            self.damage("json-nan", f"{word} is not a JSON number", "write a finite number", where)
        elif _NUMBER.fullmatch(word):
            value = json.loads(word) if len(word) <= MAX_DIGITS else math.inf
            if isinstance(value, float) and math.isinf(value):
                self.damage("json-number", "this number is too large", "write a smaller number", where)
                value = None
        elif match is None and word and word in ",]}":
            self.damage("json-syntax", "a value is missing here", "write a value, or delete the key", where)
            return None
        elif match is None:
            found = f"found {word!r}" if word else "the file ends here"
            fix = OTHER_SIGNS.get(word, "write a value, or delete the key" if where else 'write { "dataset": "..." }')
            self.stop("json-syntax", f"expected a value, {found}", fix)
        else:
            fix = f"write {as_json(word)}" if where else 'a config is JSON: { "key": value, ... }'
            self.damage("json-syntax", f"expected a value, found {word[:40]!r}", fix, where)
        self.at += len(word)
        return value

    def peek(self) -> str:
        """The next character after spaces and comments; empty at the end."""
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
        if len(self.problems) == MAX_PROBLEMS:
            raise _Stop

    def damage(self, code: str, message: str, fix: str, where: Path | None) -> None:
        """A value at the cursor that cannot be read; `where` is None for a key, and () for the whole document."""
        self.complain(code, message, fix, self.at, str(where[0]) if where else None)
        if where == ():
            raise _Stop
        self.damaged |= {where} if where else set()

    def stop(self, code: str, message: str, fix: str) -> NoReturn:
        self.complain(code, message, fix, self.at)
        raise _Stop


def as_json(word: str) -> str:
    """A word of another language as JSON: True, .5, +5, 0x10 or 1_000; any other word becomes a string."""
    if word[0] not in "+-.0123456789":
        return _OTHER_LANGUAGES.get(word.lower()) or json.dumps(word)
    with suppress(ValueError, SyntaxError):
        number = ast.literal_eval(word.lstrip("+"))
        if isinstance(number, int | float) and abs(number) < 1e300:
            return json.dumps(number)
    return "a JSON number, for example 0.5 or 5e-7"


def parse(text: str, file: str) -> Document:
    """Parse `text`. Never raises: errors are in the document's problems."""
    scan = _Scanner(text.removeprefix("\ufeff"), file)
    with suppress(_Stop):
        scan.document()
    scan.damaged |= {path for _, path in scan.open if path}
    value = scan.root[0] if scan.root else None
    return Document(value, scan.positions, tuple(scan.problems), frozenset(scan.damaged), scan.complete)


def name_text(key: str) -> str:
    """A key as YAML and TOML read it: in quotes, unless it is a plain name."""
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", key) is not None and key.lower() not in ("null", "true", "false")
    return key if plain else value_text(key)


def value_text(value: object) -> str:
    """A value as JSON that YAML and TOML read too: they do not take all characters that JSON has, or read a line break."""
    text = json.dumps(value, ensure_ascii=False)
    return re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda found: f"\\u{ord(found[0]):04x}", text)
