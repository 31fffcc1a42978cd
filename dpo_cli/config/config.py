"""Config text to a checked, frozen `Config`: read, overridden, filled with defaults, and everything wrong named at once."""

from __future__ import annotations

import codecs
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dpo_cli.config import check, guidance, reader, rules
from dpo_cli.config.options import Config
from dpo_cli.config.schema import defaults, options, profile_defaults
from dpo_cli.errors import InvalidInput, Problem, UsageError

Source = Literal["config", "override", "default", "profile", "measured"]
PLAN_VERSION = 1  # of plan.json, which is read as a config too
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Loaded:
    """A config file as read: its values with defaults filled in, where each came from, and all that is wrong with it.

    `config` is None when an error was found.
    """

    file: str
    values: dict[str, Any]
    sources: dict[str, Source]
    positions: Mapping[reader.Path, tuple[int, int]]
    problems: tuple[Problem, ...] = ()
    config: Config | None = None

    def placed(self, problem: Problem, path: reader.Path = ()) -> Problem:
        """The problem with its place in the file, or on the command line; `path` leads into the value of its key."""
        if problem.key is not None and self.sources.get(problem.key) == "override":
            return replace(problem, file="command line")
        where = path or ((problem.key,) if problem.key else ())
        line, column = self.positions.get(where, (None, None)) if where else (None, None)
        return replace(problem, file=self.file, line=line, column=column)

    def require(self) -> Config:
        """The config, or `InvalidInput` with every problem."""
        if self.config is None:
            raise InvalidInput(self.problems)
        return self.config


def load(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and check the config at `path`; `-` is standard input. Never raises for what the file says."""
    changes = _parse_overrides(overrides)
    text, problems = _read_text(path)
    if text is None:
        return Loaded(path, {}, {}, {}, problems)
    document = reader.parse(text, path)
    values, positions, problems = document.value, document.positions, document.problems
    if not isinstance(values, dict):
        return Loaded(path, {}, {}, {}, problems or (_not_an_object(path, values),))
    if values.get("plan_version") == PLAN_VERSION and isinstance(values.get("config"), dict):  # repeats its run
        positions = {key[1:]: where for key, where in positions.items() if key[:1] == ("config",)}
        values = values["config"]
    readable = {key: value for key, value in values.items() if key not in document.damaged}
    given = {key: value for key, value in {**readable, **changes}.items() if not _says_default(key, value)}
    resolved, sources = _resolved(given, changes)
    loaded = Loaded(path, resolved, sources, positions, problems)
    found = [loaded.placed(problem, place) for place, problem in check.problems(given)]
    if document.complete:
        named = {**given, **dict.fromkeys(document.damaged - changes.keys())}
        wrong = {problem.key for problem in found if problem.severity == "error"} | (named.keys() - given.keys())
        sound = {key: value for key, value in resolved.items() if key not in wrong}
        related = [*check.missing(named), *rules.check(sound, named), *guidance.check(sound, named)]
        found += map(loaded.placed, related)
    problems = (*problems, *found)
    failed = any(problem.severity == "error" for problem in problems)
    return replace(loaded, problems=problems, config=None if failed else Config(**_normalised(resolved)))


def _resolved(given: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Source]]:
    """The values with the defaults of their strategy and profile, and where each came from."""
    strategy, profile = (str(given.get(key)) for key in ("strategy", "compute_specs"))
    read_as = {"strategy": "sft", "use_4bit": given.get("use_4bit", True)} if strategy == "qlora" else {}
    values = {**defaults("sft" if read_as else strategy, profile), **given, **read_as}
    values.pop("$schema", None)
    sources: dict[str, Source] = dict.fromkeys(values, "default")
    sources |= dict.fromkeys(profile_defaults(profile), "profile")
    sources |= dict.fromkeys([*given, *read_as], "config")
    sources |= dict.fromkeys(changes, "override")
    return values, sources


def _says_default(key: str, value: Any) -> bool:
    return key in options() and any(value is word or value == word for word in options()[key].unset)


def _not_an_object(path: str, value: Any) -> Problem:
    is_data = isinstance(value, list) and value and isinstance(value[0], dict) and check.PAIR_KEYS & value[0].keys()
    fix = 'this looks like a dataset: name it in the "dataset" of a config' if is_data else 'write { "dataset": "..." }'
    return Problem("error", "config-type", "a config is a JSON object", fix, None, path, 1, 1)


def _read_text(path: str) -> tuple[str | None, tuple[Problem, ...]]:
    def unreadable(message: str, fix: str) -> tuple[None, tuple[Problem, ...]]:
        return None, (Problem("error", "config-unreadable", message, fix, file=path),)

    try:
        data = sys.stdin.buffer.read(MAX_CONFIG_BYTES + 1) if path == "-" else _read_bounded(Path(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).name, [file.name for file in _siblings(path)], 1)
        fix = f"did you mean {Path(path).parent / near[0]}?" if near else "check the path; see configs/ for examples"
        return unreadable(f"there is no file {path}", fix)
    except (OSError, ValueError) as error:  # a directory, a file that may not be read, a name no file can have
        return unreadable(f"cannot read {path}: {getattr(error, 'strerror', None) or error}", "name a readable JSON file")
    if len(data) > MAX_CONFIG_BYTES:
        return unreadable(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes: not a config", "is this the dataset?")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        return unreadable(f"{path} is UTF-16 or UTF-32, or no text at all", "save it as UTF-8")
    try:
        return data.decode("utf-8"), ()
    except UnicodeDecodeError as error:
        return unreadable(f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8")


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


def _siblings(path: str) -> Iterator[Path]:
    parent = Path(path).parent
    return parent.iterdir() if parent.is_dir() else iter(())


def is_override(word: str) -> bool:
    """Whether a word of the command line is key=value, and not the name of a file."""
    return re.match(r"[A-Za-z_]\w*=", word) is not None and not os.path.exists(word)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words to values: JSON where it parses (5e-5, true, ["q_proj"]), else the text itself."""
    parsed: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not an override", "write key=value, for example learning_rate=5e-5")
        document = reader.parse(text, word)
        is_text = document.problems or (check.fits(key, text) and not check.fits(key, document.value))
        parsed[key] = text if is_text else document.value
    return parsed


def _normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """3.0 is an integer to JSON schema; make it one for Python too."""
    whole = {name for name, option in options().items() if "integer" in option.rule.get("type", "")}
    return {key: int(value) if key in whole and isinstance(value, float) else value for key, value in values.items()}
