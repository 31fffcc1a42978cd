"""Limits that a script puts on the figures of an evaluation: `--fail-under accuracy=0.6,kl_sequence<10`. No torch.

NAME=X and NAME>=X ask for at least X, NAME>X for more, NAME<=X for at most X, NAME<X for less. NAME is a figure of the policy,
or one of `base.` or `gain.`: gain.logp_accuracy>0. A figure that an evaluation does not have, or that is no number, misses. So
does one of a model's answers where a prompt left no room for one: nobody knows what it is with them.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_cli.errors import UsageError
from dpo_cli.strategies.figures import FIGURES

COMPARED: dict[str, Callable[[float, float], bool]] = {
    "=": operator.ge,
    ">=": operator.ge,
    ">": operator.gt,
    "<=": operator.le,
    "<": operator.lt,
}
OF_BOTH = tuple(name for name, figure in FIGURES.items() if figure.alone)
METRICS = (*FIGURES, *(f"{group}.{name}" for group in ("base", "gain") for name in OF_BOTH))
OF_VOTES = ("win_rate",)
EXAMPLE = "--fail-under 'accuracy=0.6,kl_sequence<10'"


@dataclass(frozen=True)
class Threshold:
    """A limit on one figure."""

    metric: str
    sign: str
    limit: float

    def of(self, value: float | None, is_whole: bool = True) -> dict[str, Any]:
        """An entry of `thresholds` in `eval --json`; a figure that is not of all that it should be of keeps no limit."""
        is_met = is_whole and value is not None and math.isfinite(value) and COMPARED[self.sign](value, self.limit)
        return {"metric": self.metric, "limit": self.limit, "value": value, "ok": is_met}


def parse(text: str, known: Sequence[str] = METRICS) -> list[Threshold]:
    """The limits in the text; `UsageError` for what is none."""
    return [_parsed(part.strip(), known) for part in text.split(",")]


def _parsed(part: str, known: Sequence[str]) -> Threshold:
    found = re.fullmatch(r"([\w.]+)\s*(>=|<=|=|>|<)\s*([-+.\w]+)", part)
    if found is None:
        raise UsageError(f"--fail-under: {part!r} is no limit", EXAMPLE)
    name, sign, number = found.groups()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        fix = f"did you mean {near[0]}?" if near else f"the figures are {', '.join(known)}"
        raise UsageError(f"--fail-under: there is no figure {name}", fix)
    try:
        limit = float(number)
    except ValueError as error:
        raise UsageError(f"--fail-under: {number!r} is no number", EXAMPLE) from error
    if math.isnan(limit):
        raise UsageError(f"--fail-under: {part!r} is no limit", EXAMPLE)
    figure = FIGURES.get(name.rpartition(".")[2])
    if sign == "=" and figure is not None and not figure.is_better_large:
        raise UsageError(f"--fail-under: {part} would ask for a {name} of {number} or more", f"write {name}<{number}")
    return Threshold(name, sign, limit)


def judged_by(thresholds: Sequence[Threshold], judged: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `eval --json` says of the limits on these figures, or on a tally's."""
    return [
        threshold.of(
            _value(judged, threshold.metric),
            is_whole=not _is_of_answers(threshold.metric) or not judged.get("unanswered"),
        )
        for threshold in thresholds
    ]


def _is_of_answers(metric: str) -> bool:
    figure = FIGURES.get(metric.rpartition(".")[2])
    return figure is not None and figure.of_answers


def _value(judged: Mapping[str, Any], metric: str) -> float | None:
    group, _, name = metric.rpartition(".")
    if name in OF_VOTES:
        figure = judged[name]
    elif name == "answer_tokens":
        figure = (judged["answer_tokens"] or {}).get(group or "policy")
    else:
        figure = (judged[group or "policy"] or {}).get(name)
    return float(figure["value"]) if figure else None
