"""Figures in words: how each is called and shown, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_cli.evaluation.thresholds import BETTER_SMALL

Figure = Mapping[str, float]  # value, low, high: a 95 % interval


def is_finite(figure: Figure) -> bool:
    """Whether there is a value: JSON has null where it was not a number."""
    return None not in figure.values()


def sign(figure: Figure) -> int:
    """1 or -1 where the whole interval is on one side of zero, else 0: not clear of it."""
    return (figure["low"] > 0) - (figure["high"] < 0)


def negative(figure: Figure) -> Figure:
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}


@dataclass(frozen=True)
class Told:
    """A figure as text: its value, and its interval with the unit where that is a word."""

    value: str
    about: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.about}".rstrip()


NOT_FINITE = Told("not finite")


def share(figure: Figure) -> Told:
    """98.8 % [96, 100]"""
    return Told(f"{100 * figure['value']:.1f} %", f"[{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]")


def points(figure: Figure, signed: bool = True) -> Told:
    """+14.1 points [+8, +21]: a difference of two shares."""
    one, whole = ("+.1f", "+.0f") if signed else (".1f", ".0f")
    return Told(f"{100 * figure['value']:{one}}", f"points [{100 * figure['low']:{whole}}, {100 * figure['high']:{whole}}]")


def number(figure: Figure, signed: bool = False, digits: int = 3) -> Told:
    """1.401 [1.193, 1.620]"""
    form = f"{'+' if signed else ''}.{digits}f"
    return Told(f"{figure['value']:{form}}", f"[{figure['low']:{form}}, {figure['high']:{form}}]")


@dataclass(frozen=True)
class Term:
    """A figure in words. A `share` is shown in per cent."""

    label: str
    meaning: str
    is_share: bool = False
    digits: int = 3

    def told(self, figure: Figure) -> Told:
        if not is_finite(figure):
            return NOT_FINITE
        return share(figure) if self.is_share else number(figure, digits=self.digits)

    def gain(self, figure: Figure) -> Told:
        if not is_finite(figure):
            return NOT_FINITE
        return points(figure) if self.is_share else number(figure, signed=True, digits=self.digits)


def is_better_large(name: str) -> bool:
    """Whether a gain in the figure above zero is a good one."""
    return name not in BETTER_SMALL


# The figures that are never told without each other, and the one whose gain goes with them.
TOGETHER = {"dpo": (("accuracy", "margin", "loss"), "logp_accuracy"), "sft": (("loss", "token_accuracy"), "loss")}

# Each figure of an evaluation, in the order in which they are shown.
TERMS = {
    "accuracy": Term(
        "reward accuracy",
        "The share of pairs whose chosen response has the larger reward, beta * (log p after - log p before the training); "
        "a tie counts half. It reaches 1 long before a model has changed, so read it with the margin.",
        is_share=True,
    ),
    "margin": Term("margin", "The reward of the chosen response minus that of the rejected one, on average."),
    "loss": Term(
        "loss",
        "Of pairs -log sigmoid(margin): ln 2 = 0.693 where nothing has moved. Of demonstrations nats per token.",
    ),
    "token_accuracy": Term("token accuracy", "The share of tokens that the model finds most likely.", is_share=True),
    "logp_accuracy": Term(
        "log-prob accuracy",
        "The share of pairs in which one model alone gives the chosen response the larger probability. The gain, after "
        "minus before on the same pairs, is what training changed.",
        is_share=True,
    ),
    "normalized_logp_accuracy": Term(
        "log-prob accuracy by length", "Log-prob accuracy after dividing by the responses' tokens.", is_share=True
    ),
    "kl_sequence": Term(
        "KL per answer",
        "How far the training has moved the model: log p after - log p before over answers sampled after it, nats. The "
        "documentation says below 10.",
        digits=1,
    ),
    "kl_token": Term("KL per token", "The exact KL divergence from before the training at each token of the responses, nats."),
}
