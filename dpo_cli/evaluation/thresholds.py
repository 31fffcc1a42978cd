"""Limits on the figures of an evaluation: `--fail-under accuracy=0.6,kl_sequence<10`. No torch.

NAME=X and NAME>=X require at least X, NAME>X more, NAME<=X at most X, NAME<X less. NAME is a figure of the policy,
or one of `base.` or `gain.`: gain.logp_accuracy>0. A figure that is missing or not a number misses its limit. So
does a figure of answers if a prompt left no room for one: its value with them is unknown.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpo_cli.errors import UsageError
from dpo_cli.results.intervals import Interval
from dpo_cli.results.judgement import Evaluation, Limit
from dpo_cli.results.tally import Tally
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

    def of(self, value: float | None, is_whole: bool = True) -> Limit:
        """Whether a value keeps the limit; an incomplete figure misses every limit."""
        is_met = is_whole and value is not None and math.isfinite(value) and COMPARED[self.sign](value, self.limit)
        return Limit(self.metric, self.limit, value, is_met)


def parse(text: str, known: Sequence[str] = METRICS) -> list[Threshold]:
    """The limits in the text; `UsageError` for anything else."""
    return [_parsed(part.strip(), known) for part in text.split(",")]


def _parsed(part: str, known: Sequence[str]) -> Threshold:
    match = re.fullmatch(r"([\w.]+)\s*(>=|<=|=|>|<)\s*([-+.\w]+)", part)
    if match is None:
        raise UsageError(f"--fail-under: {part!r} is not a limit", EXAMPLE)
    name, sign, number = match.groups()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        fix = f"did you mean {near[0]}?" if near else f"the figures are {', '.join(known)}"
        raise UsageError(f"--fail-under: unknown figure {name}", fix)
    try:
        limit = float(number)
    except ValueError as error:
        raise UsageError(f"--fail-under: {number!r} is not a number", EXAMPLE) from error
    if math.isnan(limit):
        raise UsageError(f"--fail-under: {part!r} is not a limit", EXAMPLE)
    figure = FIGURES.get(name.rpartition(".")[2])
    if sign == "=" and figure is not None and not figure.is_better_large:
        raise UsageError(f"--fail-under: {part} requires a {name} of {number} or more", f"write {name}<{number}")
    return Threshold(name, sign, limit)


def judged_by(thresholds: Sequence[Threshold], judged: Evaluation | Tally | None) -> list[Limit]:
    """The limits on the figures of an evaluation, or of a tally of votes."""
    unanswered = isinstance(judged, Evaluation) and judged.unanswered > 0
    limits = []
    for threshold in thresholds:
        figure = _figure(judged, threshold.metric)
        is_whole = not (unanswered and _is_of_answers(threshold.metric))
        limits.append(threshold.of(figure.value if figure else None, is_whole))
    return limits


def _is_of_answers(metric: str) -> bool:
    figure = FIGURES.get(metric.rpartition(".")[2])
    return figure is not None and figure.of_answers


def _figure(judged: Evaluation | Tally | None, metric: str) -> Interval | None:
    if judged is None:
        return None
    if isinstance(judged, Tally):
        return judged.win_rate
    side, _, name = metric.rpartition(".")
    if name == "answer_tokens":
        return (judged.answer_tokens or {}).get(side or "policy")
    return judged.sides.of(side or "policy").get(name) if judged.sides else None
