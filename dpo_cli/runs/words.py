"""Figures in words: how each is called and shown, and what it means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Figure = Mapping[str, float]  # value, low, high: a 95 % interval


def is_finite(figure: Figure) -> bool:
    """Whether there is a value: JSON has null where it was not a number."""
    return None not in figure.values()


def sign(figure: Figure) -> int:
    """1 or -1 where the whole interval is on one side of zero, else 0: not clear of it."""
    return (figure["low"] > 0) - (figure["high"] < 0)


def share(figure: Figure) -> str:
    """98.8 % [96, 100]"""
    return f"{100 * figure['value']:.1f} % [{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]"


def points(figure: Figure, signed: bool = True) -> str:
    """+14.1 points [+8, +21]: a difference of two shares."""
    one, whole = ("+.1f", "+.0f") if signed else (".1f", ".0f")
    return f"{100 * figure['value']:{one}} points [{100 * figure['low']:{whole}}, {100 * figure['high']:{whole}}]"


def number(figure: Figure, signed: bool = False, digits: int = 3) -> str:
    """1.401 [1.193, 1.620]"""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{figure['value']:{form}} [{figure['low']:{form}}, {figure['high']:{form}}]"


@dataclass(frozen=True)
class Term:
    """A figure in words. A `share` is shown in per cent; `less_is_better` says which gain is good."""

    label: str
    meaning: str
    is_share: bool = False
    less_is_better: bool = False
    digits: int = 3

    def text(self, figure: Figure | None) -> str:
        if figure is None or not is_finite(figure):
            return "" if figure is None else "not finite"
        return share(figure) if self.is_share else number(figure, digits=self.digits)

    def gain(self, figure: Figure) -> str:
        if not is_finite(figure):
            return "not finite"
        return points(figure) if self.is_share else number(figure, signed=True, digits=self.digits)


# The figures that are never told without each other, and the one whose gain goes with them.
TOGETHER = {"dpo": (("accuracy", "margin", "loss"), "logp_accuracy"), "sft": (("loss", "token_accuracy"), "loss")}

# Each figure of an evaluation, in the order in which they are shown.
TERMS = {
    "accuracy": Term(
        "reward accuracy",
        "The share of pairs whose chosen response has the larger reward, beta * (log p of the adapter - log p of the base); "
        "a tie counts half. It reaches 1 long before a model has changed, so read it with the margin.",
        is_share=True,
    ),
    "margin": Term("margin", "The reward of the chosen response minus that of the rejected one, on average."),
    "loss": Term(
        "loss",
        "Of pairs -log sigmoid(margin): ln 2 = 0.693 where nothing has moved. Of demonstrations nats per token.",
        less_is_better=True,
    ),
    "token_accuracy": Term("token accuracy", "The share of tokens that the model finds most likely.", is_share=True),
    "logp_accuracy": Term(
        "log-prob accuracy",
        "The share of pairs in which one model alone gives the chosen response the larger probability. The gain, adapter minus "
        "base on the same pairs, is what training changed.",
        is_share=True,
    ),
    "normalized_logp_accuracy": Term(
        "log-prob accuracy by length", "Log-prob accuracy after dividing by the responses' tokens.", is_share=True
    ),
    "kl_sequence": Term(
        "KL per answer",
        "How far the policy has moved from its base: log p of both over answers that the policy samples, nats. The "
        "documentation says below 10.",
        less_is_better=True,
        digits=1,
    ),
    "kl_token": Term(
        "KL per token", "The exact KL divergence from the base at each token of the responses, nats.", less_is_better=True
    ),
}
