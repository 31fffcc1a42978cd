"""Parse YAML text to values and their positions.

PyYAML makes the nodes with their places, and refuses what is not YAML. Their values are made here: by YAML 1.2, so that 1e-5 is
a number and `no` a text, where PyYAML follows YAML 1.1. No tag makes an object.
"""

from __future__ import annotations

import math
import re

import yaml

from dpo_cli.config import jsonc
from dpo_cli.config.jsonc import MAX_DEPTH, MAX_DIGITS, Document, Path
from dpo_cli.errors import Problem

MAX_VALUES = 10_000  # aliases may repeat a part of a file endlessly
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_OTHER_INTEGERS = {re.compile(r"0o[0-7]+"): 8, re.compile(r"0x[0-9a-fA-F]+"): 16}
_NULL, _TRUE, _FALSE = ("", "~", "null", "Null", "NULL"), ("true", "True", "TRUE"), ("false", "False", "FALSE")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_STANDARD = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    f"{_STANDARD}{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map")
}


def parse(text: str, file: str) -> Document:
    """Parse `text`. Never raises: errors are in the document's problems."""
    reading = _Reading(file)
    try:
        node = yaml.compose(text.removeprefix("\ufeff"), Loader=yaml.SafeLoader)
        value = reading.value(node, (), 0) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(filter(None, (error.context, error.problem)))
        return _unreadable(file, what, *((mark.line + 1, mark.column + 1) if mark else (1, 1)))
    except yaml.YAMLError as error:  # a character that YAML does not allow
        return _unreadable(file, str(error).splitlines()[0], 1, 1)
    except RecursionError:
        problem = Problem("error", "json-depth", "values are nested too deep", "a config is flat", None, file, 1, 1)
        return Document(None, {}, (problem,), complete=False)
    except _Stop:
        return Document(None, reading.positions, tuple(reading.problems), complete=False)
    return Document(value, reading.positions, tuple(reading.problems), frozenset(reading.damaged))


def _unreadable(file: str, what: str, line: int, column: int) -> Document:
    fix = "indent with spaces" if "'\\t'" in what else "correct the text at this place: a key, a colon, a space, then its value"
    if "single document" in what:
        fix = "keep one document: delete the line --- and what follows it"
    return Document(None, {}, (Problem("error", "yaml-syntax", what, fix, None, file, line, column),), complete=False)


class _Stop(Exception):
    """The nodes cannot be read further; the reason is among the problems."""


class _Reading:
    """Values of nodes."""

    def __init__(self, file: str) -> None:
        self.file, self.count = file, 0
        self.positions: dict[Path, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self.damaged: set[Path] = set()

    def value(self, node: yaml.Node, path: Path, depth: int) -> object:
        """The value of a node at this path of the document."""
        self.positions[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_VALUES:
            what = (
                f"values are nested more than {MAX_DEPTH} levels deep"
                if depth > MAX_DEPTH
                else "aliases repeat too many values"
            )
            self.complain("json-depth", what, "a config is flat", node, path)
            raise _Stop
        if node.tag not in _PLAIN_TAGS:
            self.complain(
                "yaml-syntax", f"the tag {node.tag.replace(_STANDARD, '!!')} is not supported", "delete the tag", node, path
            )
            self.damaged |= {path}
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(part, (*path, place), depth + 1) for place, part in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)  # the third kind
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, object]:
        """The keys of a mapping; those that `<<` takes from another one have its values where it has none."""
        own: dict[str, object] = {}
        merged: dict[str, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == f"{_STANDARD}merge":
                others = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for other in reversed(others):
                    taken = self.value(other, path, depth + 1)
                    merged |= taken if isinstance(taken, dict) else {}
                continue
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain("yaml-syntax", "a key is not a text", "write key: value", key_node, path)
            if key in own:
                fix = "keep one of them: other YAML readers silently use the last one"
                self.complain("duplicate-key", f'the key "{key}" is given twice', fix, key_node, (key,))
            own[key] = self.value(value_node, (*path, key), depth + 1)
        return {**merged, **own}

    def scalar(self, node: yaml.ScalarNode, path: Path) -> object:
        text = str(node.value).encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # YAML escapes halves of a pair
        if node.style is not None:  # in quotes, or a block
            return text
        if text in _NULL:
            return None
        if text in _TRUE or text in _FALSE:
            return text in _TRUE
        if _NOT_FINITE.fullmatch(text):
            self.damage("json-nan", f"{text} is not a finite number", "write a finite number", node, path)
            return None
        for pattern, base in _OTHER_INTEGERS.items():
            if pattern.fullmatch(text) and len(text) <= MAX_DIGITS:
                return int(text[2:], base)
        if not _NUMBER.fullmatch(text):
            return text
        digits = text.lstrip("+-")
        number: float = int(text) if digits.isdigit() and len(text) <= MAX_DIGITS else float(text)
        if math.isinf(number):
            self.damage("json-number", "this number is too large", "write a smaller number", node, path)
            return None
        return number

    def damage(self, code: str, message: str, fix: str, node: yaml.Node, path: Path) -> None:
        self.damaged |= {path}
        self.complain(code, message, fix, node, path)

    def complain(self, code: str, message: str, fix: str, node: yaml.Node, path: Path) -> None:
        place = node.start_mark.line + 1, node.start_mark.column + 1
        self.problems.append(Problem("error", code, message, fix, str(path[0]) if path else None, self.file, *place))


def line_of(key: str, value: object) -> str:
    """A key and its value."""
    return f"{jsonc.name_text(key)}: {jsonc.value_text(value)}"
