"""What the schema has to say of a config's values, in the words of a user; jsonschema checks them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_cli.config.reader import Path, parse
from dpo_cli.config.schema import Option, options, same, schema
from dpo_cli.errors import Problem

Found = tuple[Path, Problem]  # with the path of what is wrong, which may lie within a key's value
PAIR_KEYS = {"prompt", "chosen", "rejected", "messages", "conversations"}


def problems(given: Mapping[str, Any]) -> Iterator[Found]:
    """Unknown keys, values outside of what is declared, and what this version cannot train with yet."""
    from jsonschema.validators import Draft202012Validator

    for key in given:
        if key not in schema()["properties"]:
            yield (key,), _unknown(key)
    wrong = set()
    for error in Draft202012Validator(schema()).iter_errors(dict(given)):
        if error.absolute_path and (path := tuple(error.absolute_path)) not in wrong:  # the others are told in words of ours
            wrong.add(path)
            yield path, _bad_value(options()[str(path[0])], error.instance)
    sound = [option for name, option in options().items() if name in given and name not in {path[0] for path in wrong}]
    for option in sound:
        if not option.works(given[option.name]):
            shown = json.dumps(given[option.name], ensure_ascii=False)
            message = f'this version cannot train with "{option.name}": {shown} yet'
            fix = f'remove the key, or write "{option.name}": {json.dumps(option.rule.get("default"))}'
            yield (option.name,), Problem("warning", "not-yet", message, fix, option.name, stops_training=True)


def missing(given: Mapping[str, Any]) -> Iterator[Problem]:
    """What a run needs and the config does not name."""
    for name in schema()["required"]:
        if name not in given:
            option = options()[name]
            yield Problem("error", "missing-key", f'"{name}" is missing', f'add "{name}": "...". {option.description}', name)


def _unknown(key: str) -> Problem:
    if key in PAIR_KEYS:
        fix = 'put the rows into a .jsonl file, and name it in "dataset"'
        return Problem("error", "data-in-config", f'"{key}" belongs into a dataset, not into a config', fix, key)
    return Problem("error", "unknown-key", f'"{key}" is not an option', _meant(key), key)


def _meant(key: str) -> str:
    """The option that an unknown key most likely stands for."""
    elsewhere = {alias: name for name, option in options().items() for alias in option.known_as}
    if key in elsewhere:
        return f'here it is called "{elsewhere[key]}": {options()[elsewhere[key]].description}'
    near = difflib.get_close_matches(key.lower(), [*options(), *elsewhere], 1)
    meant = elsewhere.get(near[0], near[0]) if near else None
    return f'did you mean "{meant}"?' if meant else "remove the key; `dpo train --help` lists every option"


def _bad_value(option: Option, value: Any) -> Problem:
    """`value` is the part of the option's value that is wrong."""
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = f'"{option.name}": {shown} is not {option.type_words}'
    return Problem("error", "bad-value", message, _better(option, value), option.name)


def _better(option: Option, value: Any) -> str:
    """What to write instead."""
    choices = option.rule.get("enum", ())
    if isinstance(value, str):
        plain = value.lower().replace("-", "_")
        words = [choice for choice in choices if isinstance(choice, str)]
        meant = [word for word in words if plain and (word.startswith(plain) or plain.startswith(word))]
        near = difflib.get_close_matches(plain, words, 1, cutoff=0.75)
        if meant or near:
            return f'did you mean "{option.name}": {json.dumps((meant or near)[0])}?'
        unquoted = parse(value, "")
        if not unquoted.problems and not isinstance(unquoted.value, str) and fits(option.name, unquoted.value):
            return f"write it without quotes: {value}"
    example = option.rule.get("default")
    fix = f'for example "{option.name}": {json.dumps(example)}. ' if example is not None and not same(example, value) else ""
    return fix + option.description


def fits(name: str, value: Any) -> bool:
    """Whether the value is one that the option declares."""
    from jsonschema.validators import Draft202012Validator

    return name in options() and bool(Draft202012Validator(options()[name].rule).is_valid(value))
