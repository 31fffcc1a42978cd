"""Config text to a checked, frozen `Config`: the schema declares the options, `rules.py` relates them to each other."""

from __future__ import annotations

import difflib
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dpo_cli.config import reader, rules
from dpo_cli.errors import InvalidInput, Problem, UsageError

Source = Literal["config", "override", "default", "measured"]
PLAN_VERSION = 1  # of plan.json, which is read as a config too
MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True)
class Config:
    """The options as the user and the defaults gave them. Meaning, bounds and defaults: `schema.json`.

    The fields repeat the schema's names once, so that mypy knows their types; a test keeps the two equal.
    """

    strategy: str
    task: str
    model_name: str
    dataset: str
    provider: str
    output_dir: str | None
    num_train_epochs: float
    max_steps: int | None
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    per_device_eval_batch_size: int
    learning_rate: float
    lr_scheduler_type: str
    warmup_ratio: float
    warmup_steps: int | None
    weight_decay: float
    max_grad_norm: float
    beta: float
    lora_r: int
    lora_alpha: int | None
    lora_dropout: float
    target_modules: str | list[str]
    use_4bit: bool
    bf16: bool | None
    fp16: bool | None
    gradient_checkpointing: bool | Literal["auto"]
    prompt_sharing: bool | Literal["auto"]
    max_seq_length: int
    eval_split: float
    on_bad_rows: str
    eval_steps: int | None
    logging_steps: int
    seed: int
    device: str

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@functools.cache
def schema() -> dict[str, Any]:
    """The parsed `schema.json`."""
    loaded: dict[str, Any] = json.loads(files("dpo_cli.config").joinpath("schema.json").read_text(encoding="utf-8"))
    return loaded


def defaults() -> dict[str, Any]:
    """The default of every option that has one."""
    return {key: rule["default"] for key, rule in schema()["properties"].items() if "default" in rule}


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

    def placed(self, problem: Problem) -> Problem:
        """The problem with the place of its key in the file, or on the command line."""
        if problem.key is not None and self.sources.get(problem.key) == "override":
            return replace(problem, file="command line")
        line, column = self.positions.get((problem.key,), (None, None)) if problem.key else (None, None)
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
    document = reader.parse(text, path) if text is not None else reader.Document({}, {}, problems)
    values, positions, problems = document.value, document.positions, document.problems
    if text is None or any(problem.code != "duplicate-key" for problem in problems):  # what follows cannot be trusted
        return Loaded(path, {}, {}, {}, problems)
    if not isinstance(values, dict):
        fix = 'write { "model_name": ..., "dataset": ... }'
        return Loaded(path, {}, {}, {}, (Problem("error", "config-type", "a config is a JSON object", fix, None, path, 1, 1),))
    if values.get("plan_version") == PLAN_VERSION and isinstance(values.get("config"), dict):  # repeats its run
        positions = {key[1:]: where for key, where in positions.items() if key[:1] == ("config",)}
        values = values["config"]
    given = {**values, **changes}
    resolved = {**defaults(), **given}
    resolved.pop("$schema", None)
    sources: dict[str, Source] = dict.fromkeys(resolved, "default")
    sources |= dict.fromkeys(values, "config")
    sources |= dict.fromkeys(changes, "override")
    loaded = Loaded(path, resolved, sources, positions)
    problems = (*problems, *map(loaded.placed, _check(given)))
    failed = any(problem.severity == "error" for problem in problems)
    return replace(loaded, problems=problems, config=None if failed else Config(**_normalised(resolved)))


def _check(given: Mapping[str, Any]) -> list[Problem]:
    found = [*_schema_problems(given)]
    wrong = {problem.key for problem in found}
    sound = {key: value for key, value in {**defaults(), **given}.items() if key not in wrong}
    return found + rules.check(sound, frozenset(given))


def _read_text(path: str) -> tuple[str | None, tuple[Problem, ...]]:
    def unreadable(message: str, fix: str) -> tuple[None, tuple[Problem, ...]]:
        return None, (Problem("error", "config-unreadable", message, fix, file=path),)

    try:
        data = sys.stdin.buffer.read() if path == "-" else _read_bounded(Path(path))
    except FileNotFoundError:
        near = difflib.get_close_matches(Path(path).name, [file.name for file in _siblings(path)], 1)
        fix = f"did you mean {Path(path).parent / near[0]}?" if near else "check the path; see configs/ for examples"
        return unreadable(f"there is no file {path}", fix)
    except OSError as error:  # a directory, or a file that may not be read
        return unreadable(f"cannot read {path}: {error.strerror}", "name a readable JSON file")
    if len(data) > MAX_CONFIG_BYTES:
        return unreadable(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes: not a config", "is this the dataset?")
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


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` words to values: JSON where it parses (5e-5, true, ["q_proj"]), else the text itself."""
    parsed: dict[str, Any] = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r} is not an override", "write key=value, for example learning_rate=5e-5")
        document = reader.parse(text, word)
        is_text = schema()["properties"].get(key, {}).get("type") == "string" and not isinstance(document.value, str)
        parsed[key] = text if document.problems or is_text else document.value
    return parsed


def _schema_problems(given: Mapping[str, Any]) -> Iterator[Problem]:
    """What the schema has to say, in the words of a user; jsonschema checks the values."""
    from jsonschema.validators import Draft202012Validator

    options, not_yet = schema()["properties"], schema()["x-not-yet"]
    for key in schema()["required"]:
        if key not in given:
            message = f'"{key}" is missing: {options[key]["description"]}'
            yield Problem("error", "missing-key", message, f'add "{key}": "..."', key)
    for key in given:
        if key in not_yet["keys"]:
            yield Problem("error", "not-yet", f'"{key}" does not work in this version', "remove the key", key)
        elif key not in options:
            near = difflib.get_close_matches(key, options, 1)
            fix = f'did you mean "{near[0]}"?' if near else "remove the key; dpo_cli/config/schema.json lists every option"
            yield Problem("error", "unknown-key", f'"{key}" is not an option', fix, key)
    for error in Draft202012Validator(schema()).iter_errors(dict(given)):
        if not error.absolute_path:
            continue  # missing and unknown keys, told above
        key = str(error.absolute_path[0])
        value = given[key]
        if isinstance(value, str) and value in not_yet["values"].get(key, ()):
            message = f'"{key}": "{value}" does not work in this version'
            yield Problem("error", "not-yet", message, f"use {_described(options[key])}", key)
        else:
            yield _bad_value(key, value)


def _bad_value(key: str, value: Any) -> Problem:
    rule = schema()["properties"][key]
    shown = json.dumps(value, ensure_ascii=False)
    message = f'"{key}": {shown[:60]} is not {_described(rule)}'
    fix = rule["description"]
    if isinstance(value, str) and (near := difflib.get_close_matches(value, map(str, rule.get("enum", ())), 1)):
        fix = f'did you mean "{near[0]}"?'
    elif isinstance(value, str) and reader.parse(value, "").problems == () and "string" not in rule.get("type", ""):
        fix = f"write it without quotes: {value}"
    return Problem("error", "bad-value", message, fix, key)


def _described(rule: Mapping[str, Any]) -> str:
    """A schema rule in words: "an integer, at least 1"."""
    if "enum" in rule:
        return "one of " + ", ".join(json.dumps(choice) for choice in rule["enum"])
    names = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false"}
    names |= {"array": "a list", "null": "null"}
    types = [rule["type"]] if isinstance(rule["type"], str) else rule["type"]
    words = [" or ".join(names[name] for name in types)]
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    words += [f"{word} {rule[bound]:,}" for bound, word in bounds.items() if bound in rule]
    return ", ".join(words)


def _normalised(values: Mapping[str, Any]) -> dict[str, Any]:
    """3.0 is an integer to JSON schema; make it one for Python too."""
    options = schema()["properties"]
    whole = {key for key, rule in options.items() if "integer" in rule.get("type", "")}
    return {key: int(value) if key in whole and isinstance(value, float) else value for key, value in values.items()}
