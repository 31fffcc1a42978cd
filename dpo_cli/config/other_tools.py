"""Keys and values of other tools, and misspelt ones: what to write instead.

Other names of an option with the same values are in schema.json (x-known-as), and so are other names of its values
(x-known-values). All other keys, and what replaces them, are in other_tools.json. A key of another tool is never read as a
misspelt option; only a key that differs by a few letters is.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from typing import NotRequired, TypedDict

from dpo_cli.config.schema import Option, options, same

UNKNOWN = "remove the key; `dpo train --help` lists every option"
LETTERS_A_SLIP = 10  # a name may differ by one letter, and by one more per this many letters
_DEFAULT_OF = "$loss_type"  # in other_tools.json: the config's own loss, which must be a single one, or the default


# One use of a key: for values that fit the JSON schema `if`, the keys and values of this tool.
Case = TypedDict("Case", {"if": NotRequired[Mapping[str, object]], "write": dict[str, object]})


class Entry(TypedDict):
    """Some keys of other tools, and what replaces them here."""

    keys: list[str]
    why: str
    cases: NotRequired[list[Case]]
    over: NotRequired[bool]


@functools.cache
def entries() -> list[Entry]:
    """other_tools.json, whose description says what an entry holds."""
    text = files("dpo_cli.config").joinpath("other_tools.json").read_text(encoding="utf-8")
    loaded: list[Entry] = json.loads(text)["entries"]
    return loaded


@functools.cache
def names() -> dict[str, str]:
    """The option of each other name with the same values."""
    return {alias: name for name, option in options().items() for alias in option.known_as}


def fits(name: str, value: object) -> bool:
    """Whether the value is valid for the option."""
    return name in options() and _is_valid(options()[name].rule, value)


def _is_valid(rule: Mapping[str, object], value: object) -> bool:
    from jsonschema.validators import Draft202012Validator

    return bool(Draft202012Validator(rule).is_valid(value))


def as_here(option: Option, value: object) -> object:
    """An option's value as this tool writes it: "all" layers are "all-linear", and names in one text become a list."""
    known = option.known_values
    sole = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(sole, str) and _word(sole) in known:
        return known[_word(sole)]
    if isinstance(value, list):
        return [known.get(_word(part), part) if isinstance(part, str) else part for part in value]
    if not isinstance(value, str) or re.fullmatch(r"[\w ,]+", value) is None:
        return value
    if option.name == "target_modules" or not fits(option.name, value):  # its text is a pattern of whole names
        parts = [part.strip() for part in value.split(",")]
        return parts if fits(option.name, parts) else value
    return value


def _word(text: str) -> str:
    return re.sub(r"[\s-]", "_", text.strip().lower())


def meant_by(given: Mapping[str, object]) -> set[str]:
    """The options that unknown keys mean, so that they are not reported as missing too."""
    unknown = {key: value for key, value in given.items() if key not in options()}
    plain = {names()[key] for key in unknown if key in names()}
    return plain.union(*(replacement(entry, value, given) or () for key, value in unknown.items() if (entry := entry_of(key))))


def advice(key: str, given: Mapping[str, object]) -> str:
    """What to write instead of an unknown key."""
    if key in names():
        return _other_name(key, names()[key], given)
    if (entry := entry_of(key)) is not None:
        return _elsewhere(key, entry, given)
    near = nearest(_snake(key), [*options(), *names(), *(key for entry in entries() for key in entry["keys"])])
    if not near:
        return UNKNOWN
    if (entry := entry_of(near)) is not None:
        return f'remove the key; did you mean "{near}" of other tools? {entry["why"]}'
    meant = names().get(near, near)
    taken = _taken(key, meant, given)
    return f'did you mean "{meant}"?' if not taken else f"remove the key: {taken}"


def own_advice(key: str, given: Mapping[str, object]) -> str | None:
    """What to write for an option's value that another tool uses; None if no tool uses it."""
    entry = entry_of(key)
    instead = replacement(entry, given[key], given) if entry else None
    return f"write {_written(instead)} instead: {entry['why']}" if entry and instead else None


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one known word that differs by few letters; None if two are equally near."""
    from rapidfuzz.distance import OSA

    allowed = 0 if len(word) < 4 else 1 + len(word) // LETTERS_A_SLIP
    near = {name: OSA.distance(word, name, score_cutoff=allowed) for name in known}
    best = min(near.values(), default=allowed + 1)
    meant = {names().get(name, name): name for name, distance in near.items() if distance == best <= allowed}
    return next(iter(meant.values())) if len(meant) == 1 else None


def _snake(key: str) -> str:
    """learningRate and learning-rate as learning_rate."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_")


def entry_of(key: str) -> Entry | None:
    """The entry of a key in other_tools.json: one that names it, else one whose wildcard matches it."""
    named = (entry for entry in entries() if key in entry["keys"])
    like = (entry for entry in entries() if any("*" in name and fnmatch.fnmatchcase(key, name) for name in entry["keys"]))
    return next(named, None) or next(like, None)


def _other_name(key: str, name: str, given: Mapping[str, object]) -> str:
    option, value = options()[name], as_here(options()[name], given[key])
    if taken := _taken(key, name, given):
        return f"remove the key: {taken}"
    if not fits(name, value):
        return f'here it is called "{name}", and is {option.type_words}: {option.description}'
    if not same(value, given[key]):
        return f"write {_written({name: value})} instead: {option.description}"
    return f'here it is called "{name}": {option.description}'


def _elsewhere(key: str, entry: Entry, given: Mapping[str, object]) -> str:
    instead = replacement(entry, given[key], given)
    if not instead:
        return f"remove the key: {entry['why']}"
    taken = [text for name in instead if (text := _taken(key, name, given))]
    if taken and not entry.get("over") and _DEFAULT_OF not in json.dumps(entry["cases"]):
        return f"remove the key: {taken[0]}"
    return f"write {_written(instead)} instead: {entry['why']}"


def replacement(entry: Entry, value: object, given: Mapping[str, object]) -> dict[str, object] | None:
    """Keys and values of this tool that mean the same as this value; None if there are none."""
    sole = value[0] if isinstance(value, list) and len(value) == 1 else value
    fitting = (case["write"] for case in entry.get("cases", ()) if _is_valid(case.get("if", {}), sole))
    if (written := next(fitting, None)) is None:
        return None
    loss = given.get("loss_type", options()["loss_type"].default())
    if _DEFAULT_OF in json.dumps(written) and not (isinstance(loss, str) and "loss_weights" not in given):
        return None
    places = {"$value": sole, _DEFAULT_OF: loss}
    return {name: _filled(part, places) for name, part in written.items()}


def _filled(written: object, places: Mapping[str, object]) -> object:
    if isinstance(written, dict):
        return {name: _filled(part, places) for name, part in written.items()}
    if isinstance(written, list):
        return [_filled(part, places) for part in written]
    return places.get(written, written) if isinstance(written, str) else written


def _taken(key: str, name: str, given: Mapping[str, object]) -> str:
    """A text if the config already gives the option that the key means; else empty."""
    others: Iterator[str] = (other for other in given if other != key and names().get(other, other) == name)
    other = next(others, None)
    if other is None:
        return ""
    if other == name:
        return f'this config already sets "{name}", which has the same meaning'
    return f'"{other}" has the same meaning, and dpo calls it "{name}"'


def _written(values: Mapping[str, object]) -> str:
    return ", ".join(f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in values.items())
