"""Problems of a config's values by the schema, in a user's words; jsonschema checks the values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dpo_cli.config import other_tools
from dpo_cli.config.jsonc import Path, as_json, parse
from dpo_cli.config.other_tools import fits
from dpo_cli.config.schema import Option, options, same, schema
from dpo_cli.errors import Problem

if TYPE_CHECKING:
    from jsonschema import ValidationError

Found = tuple[Path, Problem]  # a problem, with the path of the value or part of a value that it is about
PAIR_KEYS = {"prompt", "chosen", "rejected", "messages", "conversations"}


def value_problems(given: Mapping[str, object]) -> Iterator[Found]:
    """Unknown keys, invalid values, and values that this version does not support yet."""
    from jsonschema.validators import Draft202012Validator

    for key in given:
        if key not in schema()["properties"]:
            yield (key,), _unknown(key, given)
    wrong = set()
    for error in Draft202012Validator(schema()).iter_errors(dict(given)):
        if error.absolute_path and (path := tuple(error.absolute_path)) not in wrong:  # others are reported by name
            wrong.add(path)
            yield path, _bad_value(str(path[0]), error, given)
    sound = [option for name, option in options().items() if name in given and name not in {path[0] for path in wrong}]
    for option in sound:
        if not option.works(given[option.name]):
            shown = json.dumps(given[option.name], ensure_ascii=False)
            message = f'this version does not support "{option.name}": {shown} yet'
            fix = f'remove the key, or write "{option.name}": {json.dumps(option.rule.get("default"))}'
            yield (option.name,), Problem("warning", "not-yet", message, fix, option.name, stops_training=True)


def missing(given: Mapping[str, object]) -> Iterator[Problem]:
    """Required options that the config does not give."""
    for name in schema()["required"]:
        if name not in given:
            option = options()[name]
            yield Problem("error", "missing-key", f'"{name}" is missing', f'add "{name}": "...". {option.description}', name)


def _unknown(key: str, given: Mapping[str, object]) -> Problem:
    if key in PAIR_KEYS:
        fix = 'put the rows into a .jsonl file, and name that file in "dataset"'
        return Problem("error", "data-in-config", f'"{key}" belongs in a dataset, not in a config', fix, key)
    return Problem("error", "unknown-key", f'"{key}" is not an option', other_tools.advice(key, given), key)


def _bad_value(name: str, error: ValidationError, given: Mapping[str, object]) -> Problem:
    """The problem of an `error` about the whole value of an option, or about a part of it."""
    option = Option(name, schema()["properties"][name])
    rule: Any = error.schema
    part = Option(name, rule)
    shown = json.dumps(error.instance, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    where = "".join(f"[{json.dumps(step)}]" for step in list(error.absolute_path)[1:])
    if "properties" in rule and isinstance(error.instance, dict):  # it has an unknown key, or lacks one
        message = f'"{name}"{where}: {shown} is not an object with these keys: {", ".join(rule["properties"])}'
    elif error.instance == "":
        message = f'"{name}"{where} is empty'
    else:
        message = f'"{name}"{where}: {shown} is not {part.type_words}'
    fix = option.description if where else other_tools.own_advice(name, given) or _better(option, error.instance)
    return Problem("error", "bad-value", message, fix, name)


def _better(option: Option, value: object) -> str:
    """What to write instead."""
    example = option.rule.get("default")
    here = other_tools.as_here(option, value)
    if not same(here, value) and fits(option.name, here):
        return f'write "{option.name}": {json.dumps(here)}'
    if isinstance(value, str):
        choices = option.rule.get("enum") or option.rule.get("items", {}).get("enum", ())
        words = [choice for choice in choices if isinstance(choice, str)]
        plain = value.lower().replace("-", "_")
        if near := other_tools.nearest(plain, words) or next((word for word in words if word.startswith(f"{plain}_")), None):
            return f'did you mean "{option.name}": {json.dumps(near)}?'
        unquoted = parse(as_json(value.strip()) if value.strip() else "", "")
        if not unquoted.problems and not isinstance(unquoted.value, str) and fits(option.name, unquoted.value):
            is_json = parse(value, "").problems == ()
            return f"write it without quotes: {value}" if is_json else f'write "{option.name}": {json.dumps(unquoted.value)}'
    is_example = bool(example) and not isinstance(example, bool) and not same(example, value)  # not 0, false or the value
    fix = f'for example "{option.name}": {json.dumps(example)}. ' if is_example else ""
    return fix + option.description
