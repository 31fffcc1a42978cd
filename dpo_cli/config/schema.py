"""The options that `schema.json` declares. The loader, `--help`, the docs and editors read them here."""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dpo_cli.storage.jsonio import read_json
from dpo_cli.strategies.strategies import STRATEGIES

Values = Mapping[str, Any]  # the values of a config, by option name
NAMES = {"integer": "an integer", "number": "a number", "string": "text", "boolean": "true or false", "array": "a list"} | {
    "object": "an object",
    "null": "null",
}


def schema_path() -> Path:
    """The file that a config's "$schema" names, for completion in an editor."""
    return Path(str(files("dpo_cli.config").joinpath("schema.json")))


@functools.cache
def schema() -> dict[str, Any]:
    """The parsed `schema.json`; its description explains the words with x-."""
    loaded: dict[str, Any] = read_json(schema_path())
    return loaded


@dataclass(frozen=True)
class Option:
    """One option: its name and its part of the schema."""

    name: str
    rule: Mapping[str, Any]

    @property
    def description(self) -> str:
        return str(self.rule["description"])

    @property
    def group(self) -> str:
        return str(self.rule["x-group"])

    @property
    def source(self) -> str:
        """Where the option or its guidance comes from."""
        return str(self.rule["x-source"])

    @property
    def strategies(self) -> list[str]:
        return list(self.rule["x-strategies"])

    @property
    def known_as(self) -> list[str]:
        """What other tools call it."""
        return list(self.rule.get("x-known-as", ()))

    @property
    def known_values(self) -> Mapping[str, object]:
        """The values of it under their names in other tools, in lower case with _ between words."""
        values: Mapping[str, object] = self.rule.get("x-known-values", {})
        return values

    @property
    def needs(self) -> Mapping[str, list[object]]:
        """For each other option, the values that give this option an effect."""
        needs: Mapping[str, list[object]] = self.rule.get("x-needs", {})
        return needs

    @property
    def values_for(self) -> Mapping[str, list[object]]:
        """By strategy, the values that belong to it only; it has no others."""
        values: Mapping[str, list[object]] = self.rule.get("x-values-for", {})
        return values

    @property
    def unset(self) -> list[object]:
        """Values that mean the default, like a missing key."""
        return list(self.rule.get("x-unset", ()))

    def may_change(self, strategy: str) -> bool:
        """Whether a run of this strategy can resume with another value."""
        where: bool | list[str] = self.rule.get("x-resume", False)
        return where if isinstance(where, bool) else strategy in where

    @property
    def end(self) -> str | None:
        """How it ends a training: by its "length", or by a "stop" before that."""
        return self.rule.get("x-end")

    @property
    def is_decided(self) -> bool:
        """Whether the machine decides it if the config does not; a run keeps that value."""
        return bool(self.rule.get("x-decided", False))

    @property
    def place(self) -> str | None:
        """What it names on disk: "model", "data", "prompts" or "output"."""
        return self.rule.get("x-place")

    @property
    def is_judging(self) -> bool:
        """Whether it changes how a run is evaluated, and not how it was trained."""
        return bool(self.rule.get("x-judging", False))

    @property
    def is_sampling(self) -> bool:
        """Whether it decides what `dpo augment` samples."""
        return bool(self.rule.get("x-sampling", False))

    @property
    def adapter_name(self) -> str | None:
        """Its name in PEFT's adapter config, which a trained adapter keeps."""
        return self.rule.get("x-adapter")

    @property
    def memory(self) -> str | None:
        """Whether a larger value of it, or true, takes "more" or "less" memory."""
        return self.rule.get("x-memory")

    @property
    def is_of_loss(self) -> bool:
        """Whether it changes the loss that is trained, and not the one that is reported."""
        return bool(self.rule.get("x-of-loss", False))

    @property
    def needs_held_out(self) -> bool:
        """Whether it has an effect only where pairs are held out."""
        return bool(self.rule.get("x-needs-held-out", False))

    def default(self, *situations: str) -> Any:
        """The default under these strategies and profiles."""
        special: Mapping[str, object] = self.rule.get("x-default-for", {})
        fitting = [special[name] for name in situations if name in special]
        return fitting[-1] if fitting else self.rule.get("default")

    @property
    def default_words(self) -> str:
        """The default in words, with those of strategies and profiles: "5e-07 (sft 0.0002)"."""
        if "default" not in self.rule:
            return "required"
        special: Mapping[str, object] = self.rule.get("x-default-for", {})
        others = ", ".join(f"{name} {json.dumps(value)}" for name, value in special.items())
        return json.dumps(self.default()) + (f" ({others})" if others else "")

    @property
    def not_yet_words(self) -> str:
        """The values that this version does not support, in words; empty if it supports all."""
        not_yet = self.rule.get("x-not-yet", [])
        return "not in this version yet" if not_yet is True else f"not yet: {', '.join(not_yet)}" if not_yet else ""

    def works(self, value: object) -> bool:
        """Whether this version supports the value."""
        not_yet = self.rule.get("x-not-yet", [])
        return same(value, self.rule.get("default")) if not_yet is True else value not in not_yet

    @property
    def type_words(self) -> str:
        """What a value may be, in words: "an integer from 1 to 4,096"."""
        if "x-words" in self.rule:
            return str(self.rule["x-words"])
        if "enum" in self.rule:
            return "one of " + ", ".join(json.dumps(choice) for choice in self.rule["enum"])
        types = [self.rule["type"]] if isinstance(self.rule["type"], str) else self.rule["type"]
        words = " or ".join(NAMES[name] for name in types if name != "null")
        bounded, unset = words + "".join(self._bounds()), [str(value) for value in self.unset if value is not None]
        return f"{', '.join([bounded, *unset])} or null" if "null" in types else bounded

    def _bounds(self) -> Iterator[str]:
        if "examples" in self.rule:
            yield f" like {' or '.join(map(json.dumps, self.rule['examples']))}"
        low, high = self.rule.get("minimum"), self.rule.get("maximum")
        if low is not None and high is not None:
            yield f" from {low:,} to {high:,}"
            return
        bounds = {"minimum": "of at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
        words = [f"{word} {self.rule[bound]:,}" for bound, word in bounds.items() if bound in self.rule]
        yield " " + ", ".join(words) if words else ""


def inner_defaults(name: str) -> dict[str, Any]:
    """The defaults of the parts of an option that is an object."""
    return {part: rule["default"] for part, rule in options()[name].rule["properties"].items()}


def same(one: object, other: object) -> bool:
    """Equality of JSON values: true is not 1."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


@functools.cache
def options() -> dict[str, Option]:
    """Every option by name, in the order of the schema; "$schema" is for editors, and not an option."""
    return {name: Option(name, rule) for name, rule in schema()["properties"].items() if name != "$schema"}


def names_where(test: Callable[[Option], object]) -> tuple[str, ...]:
    """The names of the options that pass the test, in the order of the schema."""
    return tuple(name for name, option in options().items() if test(option))


def defaults(*situations: str) -> dict[str, Any]:
    """The default of every option that has one, under these strategies and profiles."""
    return {name: option.default(*situations) for name, option in options().items() if "default" in option.rule}


def profile_defaults(profile: str) -> dict[str, object]:
    """The documented settings of a hardware profile: the defaults that it changes."""
    special = {name: option.rule.get("x-default-for", {}) for name, option in options().items()}
    return {name: values[profile] for name, values in special.items() if profile in values}


def options_help(width: int) -> str:
    """Every option of a config in plain text: its name, type, default and meaning."""

    def wrapped(text: str, indent: int) -> str:
        return textwrap.fill(text, max(40, width), initial_indent=" " * indent, subsequent_indent=" " * indent)

    parts = [wrapped('Options of a config: "key": value in CONFIG, or key=value on the command line.', 1)]
    for group in dict.fromkeys(option.group for option in options().values()):
        parts.append(f"\n {group}")
        for option in options().values():
            if option.group == group:
                only = f"; {', '.join(option.strategies)} only" if len(option.strategies) < len(STRATEGIES) else ""
                parts.append(wrapped(f"{option.name}: {option.type_words}; default {option.default_words}{only}", 3))
                parts.append(wrapped(option.description + (f" ({option.not_yet_words})" if option.not_yet_words else ""), 7))
    return "\n".join(parts) + "\n"
