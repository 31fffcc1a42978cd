"""The drawings of a report: the curves over the steps, and the distribution of held-out rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles

from dpo_cli.report.run_data import Contents
from dpo_cli.report.svg import Bars, Curve, Plot, histogram
from dpo_cli.strategies.figures import DRAWN, LINE_FIGURES

MARGIN = "margin"  # the figure whose rounding a run of 16 bits measures


@dataclass(frozen=True)
class Kind:
    """One plot: its texts, and the keys of metrics.jsonl that it draws, with their names in the plot."""

    title: str
    note: str
    keys: Mapping[str, str]
    from_zero: bool = False
    is_compared: bool = False  # also on the comparison page


KINDS = (
    *(
        Kind(figure.title, figure.note, {figure.name: ""}, figure.from_zero, is_compared=True)
        for figure in DRAWN
        if figure.title
    ),
    Kind(
        "Training loss",
        "The loss of the config's loss_type; the other plot has the sigmoid loss.",
        {"own_loss": ""},
        is_compared=True,
    ),
    Kind(
        "Rewards",
        "The chosen reward may fall while the margin grows. That is common; check the answers.",
        {"reward_chosen": "chosen", "reward_rejected": "rejected"},
    ),
    Kind("Learning rate", "The value of the schedule.", {"learning_rate": ""}),
    Kind("Gradient norm", "Per step, before clipping.", {"grad_norm": ""}),
    Kind("Memory", "The maximum so far, GB.", {"peak_memory_gb": ""}, from_zero=True),
)


def levels(kind: Kind, run: Contents) -> list[tuple[float, str]]:
    """The levels that the values of a plot are compared with."""
    if kind.title == "Memory":
        billed = run.summary.memory.predicted_gb if run.summary else None
        return [] if billed is None else [(billed, "billed")]
    figure = LINE_FIGURES.get(next(iter(kind.keys)))
    if figure is None:
        return []
    if figure.limit_option is not None:
        limit = run.config.get(figure.limit_option)
        return [] if limit is None else [(limit, figure.limit_option)]
    level = run.method.start_loss if figure.name == "loss" else figure.level
    levels = [] if level is None else [level]
    if figure.name == MARGIN and run.margin_rounding is not None:
        levels.append((run.margin_rounding, "rounding"))
    return levels


def plots(run: Contents) -> list[Plot]:
    """Every plot that the run has lines for."""
    drawn, end = [], max((line.step for line in run.lines), default=0)
    for kind in KINDS:
        curves = [
            Curve(name, split, run.points(split, key), colour)
            for colour, (key, name) in enumerate(kind.keys.items())
            for split in ("train", "eval")
        ]
        if kind.title == "Memory":  # both splits share one peak: the first curve has all of it
            curves = curves[:1]
        if any(curve.points for curve in curves):
            drawn.append(Plot(kind.title, kind.note, curves, levels(kind, run), end, kind.from_zero))
    return drawn


@dataclass(frozen=True)
class Spread:
    """The distribution of held-out rows: a histogram, its quantiles, and the texts for both."""

    title: str
    about: str
    listed: str  # above the lists of the best and the worst
    bars: Bars
    quantiles: Sequence[tuple[str, float]]


def spread(run: Contents) -> Spread | None:
    """None if no rows were evaluated."""
    if run.evaluation is None:
        return None
    values = [row.gain for row in run.evaluation.rows if math.isfinite(row.gain)]
    if not values:
        return None
    below = sum(value < 0 for value in values)
    parts = {"base": run.base, "who": run.who, "below": below, "count": len(values)}
    words = {name: text.format(**parts) for name, text in vars(run.method.spread).items()}
    return Spread(**words, bars=Bars(histogram(values)), quantiles=_quantiles(values))


def _quantiles(values: Sequence[float]) -> list[tuple[str, float]]:
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    ends = (("minimum", min(values)), ("10th percentile", tenths[0]), ("median", tenths[4]))
    return [*ends, ("90th percentile", tenths[8]), ("maximum", max(values))]
