"""How far a figure over prompts could be another on other prompts. No torch: a tally of votes needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
# A sum over rows divided by a sum over rows; with weights over prompts both sums are resampled together.
Ratio = tuple[Array, Array]


def mean(values: Array) -> Ratio:
    return values, np.ones_like(values)


class Intervals:
    """95 % percentile bootstrap over prompts: pairs of one prompt are drawn together, since they are not independent."""

    def __init__(self, prompts: Sequence[str], seed: int = 0) -> None:
        _, self.group = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
        count = int(self.group.max()) + 1
        draws = np.random.default_rng(seed)
        self.weights = np.stack([np.bincount(draws.integers(count, size=count), minlength=count) for _ in range(RESAMPLES)])

    def of(self, ratio: Ratio) -> dict[str, float]:
        above, below = (np.bincount(self.group, weights=side) for side in ratio)
        low, high = np.percentile((self.weights @ above) / (self.weights @ below), [2.5, 97.5])
        return {"value": float(above.sum() / below.sum()), "low": float(low), "high": float(high)}
