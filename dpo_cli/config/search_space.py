"""The words of `dpo sweep`: which keys of a config it varies, over which values, and which keys it cannot vary."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.config.config import parse_overrides
from dpo_cli.config.schema import Option, options
from dpo_cli.errors import Problem, UsageError

Setting = Mapping[str, Any]  # a value for each key that is varied
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})(?:@(?P<count>\d+))?")
WIDE = 8.0  # ends so many times apart, or more: equal factors between the values, as for a learning rate; else equal steps
DIGITS = 4  # significant, of the values between the ends of a range
MOST = 1000  # settings of a grid
NAME_LENGTH = 80  # characters of a folder
# Keys that are the same for all settings, with the reason; those that `_reason` sees in the schema are not repeated here.
FIXED = {
    "strategy": "strategies have different figures; `dpo compare` compares them",
    "stages": "it is a list of several trainings",
    "rounds": "it is a number of several trainings",
    "compare": "it is a comparison of its own; `dpo compare` runs it",
    "seed": "the best of several seeds is only the luckiest one; `dpo compare` trains with several seeds",
    **dict.fromkeys(
        ("revision", "reference", "compute_specs"), "the figures are differences from one model, loaded in one way"
    ),
    **dict.fromkeys(
        ("task", "num_processes", "logging_steps", "save_steps", "report_to", "push_to_hub", "hub_model_id"),
        "it does not change what is trained",
    ),
}


@dataclass(frozen=True)
class Axis:
    """A key and its values: a list, or a range without a count, of which a sampler draws values."""

    key: str
    values: tuple[Any, ...] = ()  # of a list, or of a range with a count
    ends: tuple[float, float] | None = None  # of a range without a count
    is_whole: bool = False  # its values are whole numbers

    @property
    def is_wide(self) -> bool:
        """Whether a range is divided, or drawn from, by equal factors."""
        return self.ends is not None and is_wide(*self.ends)

    @property
    def tried(self) -> tuple[Any, ...]:
        """The values whose validity decides that of all."""
        return self.values if self.ends is None else tuple(map(self.value, self.ends))

    def value(self, number: float) -> Any:
        """A number of a range as a value of the config: whole, or of few digits, and within the ends."""
        if self.is_whole:
            return round(number)
        assert self.ends is not None
        return _plain(min(max(_short(number), self.ends[0]), self.ends[1]))

    def to_json(self) -> object:
        return {"low": self.ends[0], "high": self.ends[1]} if self.ends is not None else list(self.values)


@dataclass(frozen=True)
class Space:
    """The axes of a sweep; `fixed` are the overrides among its words, which all settings share."""

    axes: tuple[Axis, ...]
    fixed: tuple[str, ...]

    @classmethod
    def of(cls, words: Sequence[str]) -> Space:
        """The space that words like beta=0.1,0.5 and learning_rate=1e-5..1e-3@4 describe; `UsageError` for a wrong range."""
        axes: dict[str, Axis] = {}
        fixed: dict[str, str] = {}
        for word in words:
            (key,) = parse_overrides([word])  # `UsageError` if it is not key=value
            if key in axes or key in fixed:
                raise UsageError(f"{key} is given twice", f"write its values in one word: {key}=V1,V2")
            axis = _axis(key, word.partition("=")[2])
            if axis is None:
                fixed[key] = word
            else:
                axes[key] = axis
        return cls(tuple(axes.values()), tuple(fixed.values()))

    @property
    def problems(self) -> list[Problem]:
        """An error for each key that a sweep cannot vary."""
        return [
            Problem(
                "error", "sweep-key", f'a sweep cannot vary "{axis.key}": {why}', "give it one value", axis.key, "command line"
            )
            for axis in self.axes
            if (why := _reason(axis.key))
        ]

    @property
    def is_grid(self) -> bool:
        """Whether every axis has a list of values."""
        return all(axis.ends is None for axis in self.axes)

    @property
    def size(self) -> int:
        """The number of settings of a grid."""
        return math.prod(len(axis.values) for axis in self.axes)

    def settings(self) -> Iterator[Setting]:
        """Every setting of a grid; the last axis changes fastest."""
        keys = [axis.key for axis in self.axes]
        for values in itertools.product(*(axis.values for axis in self.axes)):
            yield dict(zip(keys, values, strict=True))

    def probes(self) -> Iterator[Setting]:
        """Settings that have each value of a list, and both ends of each range, at least once."""
        first = {axis.key: axis.tried[0] for axis in self.axes}
        yield first
        for axis in self.axes:
            for value in axis.tried[1:]:
                yield {**first, axis.key: value}

    def to_json(self) -> dict[str, object]:
        return {axis.key: axis.to_json() for axis in self.axes}


def is_wide(low: float, high: float) -> bool:
    return low > 0 and high >= WIDE * low


def spaced(low: float, high: float, count: int, is_whole: bool) -> tuple[Any, ...]:
    """`count` values from `low` to `high`, both included.

    With a positive `low` and a `high` of at least 8 times it, neighbours differ by the same factor,
    low * (high / low) ** (i / (count - 1)); else by the same step. Values between the ends have four significant digits;
    whole numbers are rounded, and equal ones are one value.
    """
    parts = [place / (count - 1) for place in range(count)]
    between = [low * (high / low) ** part if is_wide(low, high) else low + (high - low) * part for part in parts]
    numbers = [low, *map(_short, between[1:-1]), high]  # the ends are as they are written
    return tuple(dict.fromkeys(map(round, numbers) if is_whole else map(_plain, numbers)))


def _short(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")


def _plain(number: float) -> float:
    """A whole number without its .0."""
    return int(number) if float(number).is_integer() else number


def folder_name(setting: Setting) -> str:
    """The name of a setting, which is a folder too: beta-0.1-learning_rate-0.0001.

    A value that a folder cannot have, or a long name, is shortened, and gets a digest of the setting.
    """
    texts = [value if isinstance(value, str) else json.dumps(value) for value in setting.values()]
    plain = [re.sub(r"[^\w.+-]+", "_", text) for text in texts]
    name = "-".join(f"{key}-{text}" for key, text in zip(setting, plain, strict=True)) or "as-given"
    if plain == texts and len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9]}-{digest}"


def _axis(key: str, text: str) -> Axis | None:
    """The axis of a word; None for a single value."""
    parts = [part for part in _parts(text) if part.strip()]
    if (match := RANGE.fullmatch(text.strip())) is not None:
        return _range(key, match)
    if len(parts) < 2 and not text.rstrip().endswith(","):
        if ".." in text and key in options() and _kinds(options()[key]) & {"number", "integer"}:
            raise _no_range(f"{key}={text}")
        return None
    values = [parse_overrides([f"{key}={part.strip()}"])[key] for part in parts]
    return Axis(key, tuple({json.dumps(value, sort_keys=True): value for value in values}.values()))


def _range(key: str, match: re.Match[str]) -> Axis:
    word = f"{key}={match.group()}"
    low, high = float(match["low"]), float(match["high"])
    count = int(match["count"]) if match["count"] else None
    kinds = _kinds(options()[key]) if key in options() else set()
    is_whole = "integer" in kinds and "number" not in kinds
    if not low < high or count in (0, 1) or (is_whole and not (low.is_integer() and high.is_integer())):
        raise _no_range(word)
    if count is None:
        return Axis(key, ends=(low, high), is_whole=is_whole)
    if count > MOST:
        raise UsageError(f"{word} has more than {MOST:,} values", "write a smaller count after @")
    return Axis(key, spaced(low, high, count, is_whole), is_whole=is_whole)


def _no_range(word: str) -> UsageError:
    way = "write LOW..HIGH@COUNT with LOW below HIGH and at least 2 values, for example learning_rate=1e-5..1e-3@4"
    return UsageError(f"{word} is not a range of values", way)


def _kinds(option: Option) -> set[str]:
    kinds = option.rule.get("type", ())
    return {kinds} if isinstance(kinds, str) else set(kinds)


def _parts(text: str) -> Iterator[str]:
    """The text divided at commas that are not within quotes or brackets."""
    start, depth, is_quoted = 0, 0, False
    for place, letter in enumerate(text):
        if letter == '"' and text[place - 1 : place] != "\\":
            is_quoted = not is_quoted
        elif not is_quoted:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not is_quoted:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _reason(key: str) -> str:
    """Why a sweep cannot vary a key; empty if it can, and for an unknown key, which the loader reports."""
    option = options().get(key)
    if option is None or key in FIXED:
        return FIXED.get(key, "")
    if option.place == "output":
        return "each setting has a folder of its own in it"
    if option.place == "model" or (option.is_sampling and option.group in ("Run", "Memory and precision")):
        return FIXED["reference"]
    if option.place is not None or option.group in ("Data", "Augmentation"):
        return "all settings are evaluated on the same held-out rows, read in the same way"
    if option.is_judging or option.group == "Health":
        return "it decides how a run is evaluated, or which settings can win"
    return ""
