"""A figure with its 95 % interval, and the figures of a policy and its base. No numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass

FEW_PROMPTS = 20  # with fewer, an interval over prompts is too narrow: for one prompt it is [v, v]


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; NaN (null in JSON) if log-probs are not finite."""

    value: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.value, self.low, self.high)))

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval is on one side of zero, else 0: not clearly different from zero."""
        return (self.low > 0) - (self.high < 0)

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)


Figures = dict[str, Interval | None]  # by the names of strategies/figures.py; None without samples


@dataclass(frozen=True)
class Sides:
    """The figures of a policy, those of its base alone, and the paired differences policy - base."""

    policy: Figures
    base: Figures
    gain: Figures

    def of(self, side: str) -> Figures:
        """The figures of `policy`, `base` or `gain`."""
        return {"policy": self.policy, "base": self.base, "gain": self.gain}[side]


def required(figures: Figures, name: str) -> Interval:
    """A figure that must exist."""
    figure = figures[name]
    assert figure is not None, f"{name} has no value"
    return figure
