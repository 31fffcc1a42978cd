"""The figures of an evaluation: what each is called, how it is shown, limited and read. All places that name one ask here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Interval = Mapping[str, float]  # value, low, high: a 95 % interval


def is_finite(figure: Interval) -> bool:
    """Whether there is a value: JSON has null where it was not a number."""
    return None not in figure.values()


def sign(figure: Interval) -> int:
    """1 or -1 where the whole interval is on one side of zero, else 0: not clear of it."""
    return (figure["low"] > 0) - (figure["high"] < 0)


def negative(figure: Interval) -> Interval:
    return {"value": -figure["value"], "low": -figure["high"], "high": -figure["low"]}


@dataclass(frozen=True)
class Told:
    """A figure as text: its value, and its interval with the unit where that is a word."""

    value: str
    about: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.about}".rstrip()


NOT_FINITE = Told("not finite")


def share(figure: Interval) -> Told:
    """98.8 % [96, 100]"""
    return Told(f"{100 * figure['value']:.1f} %", f"[{100 * figure['low']:.0f}, {100 * figure['high']:.0f}]")


def points(figure: Interval, signed: bool = True) -> Told:
    """+14.1 points [+8, +21]: a difference of two shares."""
    one, whole = ("+.1f", "+.0f") if signed else (".1f", ".0f")
    return Told(f"{100 * figure['value']:{one}}", f"points [{100 * figure['low']:{whole}}, {100 * figure['high']:{whole}}]")


def number(figure: Interval, signed: bool = False, digits: int = 3) -> Told:
    """1.401 [1.193, 1.620]"""
    form = f"{'+' if signed else ''}.{digits}f"
    return Told(f"{figure['value']:{form}}", f"[{figure['low']:{form}}, {figure['high']:{form}}]")


@dataclass(frozen=True)
class Figure:
    """A figure of an evaluation, declared once: whoever shows, limits or explains it asks here.

    Its formula is in evaluation/metrics.py. Those `of_both` are known of the model before training too, so they have a gain.
    """

    name: str
    label: str
    meaning: str
    short: str = ""  # in the live view; empty where that does not show it
    title: str = ""  # of its curve, with a note and the value it compares with; empty where there is no curve
    note: str = ""
    level: tuple[float, str] | None = None
    limit_option: str | None = None  # the option of a config that limits it
    from_zero: bool = False  # where its curve begins
    is_share: bool = False  # shown in per cent
    digits: int = 3
    is_better_large: bool = True
    of_both: bool = False
    of_answers: bool = False  # of sampled answers, which a prompt may have no room for

    def text(self, value: Interval) -> Told:
        if not is_finite(value):
            return NOT_FINITE
        return share(value) if self.is_share else number(value, digits=self.digits)

    def gain(self, value: Interval) -> Told:
        if not is_finite(value):
            return NOT_FINITE
        return points(value) if self.is_share else number(value, signed=True, digits=self.digits)


_DECLARED = (
    Figure(
        "loss",
        "loss",
        "Of pairs -log sigmoid(margin): ln 2 = 0.693 where nothing has moved. Of demonstrations nats per token.",
        short="loss",
        title="Loss",
        note="Held out it should fall too. Where it rises again, the training rows are memorised.",
        is_better_large=False,
        of_both=True,
    ),
    Figure(
        "accuracy",
        "reward accuracy",
        "The share of pairs whose chosen response has the larger reward, beta * (log p after - log p before the training); "
        "a tie counts half. It reaches 1 long before a model has changed, so read it with the margin.",
        short="accuracy",
        title="Accuracy",
        note="Share of pairs with the larger reward for chosen. Read it with the margin.",
        level=(0.5, "chance"),
        is_share=True,
    ),
    Figure(
        "token_accuracy",
        "token accuracy",
        "The share of tokens that the model finds most likely.",
        short="accuracy",  # of demonstrations, which have no other
        title="Token accuracy",
        note="Share of tokens that the model finds most likely.",
        is_share=True,
        of_both=True,
    ),
    Figure(
        "margin",
        "margin",
        "The reward of the chosen response minus that of the rejected one, on average.",
        short="margin",
        title="Margin",
        note="Reward of chosen minus reward of rejected.",
    ),
    Figure(
        "logp_accuracy",
        "log-prob accuracy",
        "The share of pairs in which one model alone gives the chosen response the larger probability. The gain, after "
        "minus before on the same pairs, is what training changed.",
        is_share=True,
        of_both=True,
    ),
    Figure(
        "normalized_logp_accuracy",
        "log-prob accuracy by length",
        "Log-prob accuracy after dividing by the responses' tokens.",
        is_share=True,
        of_both=True,
    ),
    Figure(
        "kl_token",
        "KL per token",
        "The exact KL divergence from before the training at each token of the responses, nats.",
        short="KL/token",
        title="KL per token",
        note="Distance from before the training, nats.",
        from_zero=True,
        is_better_large=False,
    ),
    Figure(
        "kl_sequence",
        "KL per answer",
        "How far the training has moved the model: log p after - log p before over answers sampled after it, nats. The "
        "documentation says below 10.",
        short="KL/seq",
        title="KL per answer",
        note="Distance from before the training over sampled answers, nats.",
        limit_option="max_kl",
        from_zero=True,
        digits=1,
        is_better_large=False,
        of_answers=True,
    ),
    Figure(
        "answer_tokens",
        "tokens of an answer",
        "How long greedy answers to held-out prompts are.",
        digits=1,
        of_both=True,
        of_answers=True,
    ),
)
FIGURES = {figure.name: figure for figure in _DECLARED}
