"""What a report draws of a run: the curves over its steps, and how the held-out rows are spread."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from dpo_cli.report.run_data import Contents
from dpo_cli.report.svg import Bars, Curve, Plot, histogram


@dataclass(frozen=True)
class Kind:
    """One plot: its words, and the keys of metrics.jsonl that are drawn, each with what it is called there."""

    title: str
    note: str
    keys: Mapping[str, str]
    from_zero: bool = False


KINDS = (
    Kind("Loss", "Held out it should fall too. Where it rises again, the training rows are memorised.", {"loss": ""}),
    Kind(
        "Training loss", "Of the loss_type of the config. The plot above it is of DPO's own loss, of sigmoid.", {"own_loss": ""}
    ),
    Kind("Accuracy", "Share of pairs with the larger reward for chosen. Read it with the margin.", {"accuracy": ""}),
    Kind("Token accuracy", "Share of tokens that the model finds most likely.", {"token_accuracy": ""}),
    Kind("Margin", "Reward of chosen minus reward of rejected.", {"margin": ""}),
    Kind(
        "Rewards",
        "Chosen may fall while the margin grows: common, and worth a look at the answers.",
        {"reward_chosen": "chosen", "reward_rejected": "rejected"},
    ),
    Kind("KL per token", "Distance from before the training, nats.", {"kl_token": ""}, from_zero=True),
    Kind("KL per answer", "Distance from before the training over sampled answers, nats.", {"kl_sequence": ""}, from_zero=True),
    Kind("Learning rate", "As the schedule had it.", {"learning_rate": ""}),
    Kind("Gradient norm", "Before clipping, of a step.", {"grad_norm": ""}),
    Kind("Memory", "The most held so far, GB.", {"peak_memory_gb": ""}, from_zero=True),
)
COMPARED = ("Loss", "Training loss", "Margin", "Accuracy", "Token accuracy", "KL per token", "KL per answer")


def levels(kind: Kind, run: Contents) -> list[tuple[float, str]]:
    """What the values of a plot compare with."""
    known: dict[str, tuple[float | None, str]] = {
        "Loss": (math.log(2) if run.strategy == "dpo" else None, "ln 2"),
        "Accuracy": (0.5, "chance"),
        "KL per answer": (run.max_kl, "max_kl"),
        "Memory": (((run.summary or {}).get("memory") or {}).get("predicted_gb"), "billed"),
    }
    value, name = known.get(kind.title, (None, ""))
    return [] if value is None else [(value, name)]


def plots(run: Contents) -> list[Plot]:
    """Every plot for which the run has lines."""
    made, end = [], max((line["step"] for line in run.lines), default=0)
    for kind in KINDS:
        curves = [
            Curve(name, split, run.points(split, key), colour)
            for colour, (key, name) in enumerate(kind.keys.items())
            for split in ("train", "eval")
        ]
        if kind.title == "Memory":  # one peak for both: that of the lines in their order is the whole curve
            curves = curves[:1]
        if any(curve.points for curve in curves):
            made.append(Plot(kind.title, kind.note, curves, levels(kind, run), end, kind.from_zero))
    return made


@dataclass(frozen=True)
class Spread:
    """How the held-out rows are spread: a histogram, its quantiles, and the words for both."""

    title: str
    about: str
    listed: str  # over the lists of the best and the worst
    bars: Bars
    quantiles: Sequence[tuple[str, float]]


def spread(run: Contents) -> Spread | None:
    """None where nothing was judged row by row."""
    if run.evaluation is None:
        return None
    values = [value for row in run.evaluation["rows"] if (value := row_value(row)) is not None]
    if not values:
        return None
    below = sum(value < 0 for value in values)
    if run.strategy == "sft":
        words = {
            "title": "Gain of each demonstration",
            "about": f"The {run.base}'s loss minus the {run.who}'s, nats per token. {below} of {len(values)} got worse.",
            "listed": f"By how far the loss fell below the {run.base}'s, nats per token.",
        }
    else:
        words = {
            "title": "Margins",
            "about": f"Of each held-out pair. Below zero, where the rejected response is preferred: {below} of {len(values)}.",
            "listed": "By their margins. The worst are worth reading first: a wrong label, or something that was not learned.",
        }
    return Spread(**words, bars=Bars(histogram(values)), quantiles=_quantiles(values))


def _quantiles(values: Sequence[float]) -> list[tuple[str, float]]:
    tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    ends = (("least", min(values)), ("lowest tenth below", tenths[0]), ("middle", tenths[4]))
    return [*ends, ("highest tenth above", tenths[8]), ("greatest", max(values))]


def row_value(row: Mapping[str, Any]) -> float | None:
    """What rows are sorted by: a pair's margin, or how far a demonstration's loss fell."""
    if "margin" in row:
        return None if row["margin"] is None else float(row["margin"])
    return None if row["loss"] is None or row["base_loss"] is None else float(row["base_loss"] - row["loss"])
