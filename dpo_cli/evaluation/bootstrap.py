"""Intervals: how much a figure could differ on other prompts. No torch: a tally of votes needs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_cli.results.intervals import Interval

Array = NDArray[np.float64]

RESAMPLES, AT_ONCE = 2000, 50
KEPT = 20_000_000  # weights, 160 MB; with more prompts they are drawn again for each figure
# A sum over rows divided by a sum over rows; weights over prompts resample both sums together.
Ratio = tuple[Array, Array]


def mean(values: Array) -> Ratio:
    return values, np.ones_like(values)


class Intervals:
    """95 % percentile bootstrap over prompts: pairs of one prompt are drawn together, since they are not independent."""

    def __init__(self, prompts: Sequence[str], seed: int = 0) -> None:
        _, self.group = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
        self.count, self.seed = int(self.group.max()) + 1, seed
        self._kept = list(self._draw()) if self.count * RESAMPLES <= KEPT else None

    def _draw(self) -> Iterator[Array]:
        """The same weights each time."""
        draws, count = np.random.default_rng(self.seed), self.count
        for _ in range(RESAMPLES // AT_ONCE):
            drawn = [np.bincount(draws.integers(count, size=count), minlength=count) for _ in range(AT_ONCE)]
            yield np.stack(drawn).astype(np.float64)

    def resamples(self) -> Iterable[Array]:
        """How often each prompt is in a resample: (`AT_ONCE`, prompts), for all resamples."""
        return self._kept or self._draw()

    def of(self, ratio: Ratio) -> Interval:
        above, below = (np.bincount(self.group, weights=side) for side in ratio)
        ratios = [(weights @ above) / (weights @ below) for weights in self.resamples()]
        low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
        return Interval(float(above.sum() / below.sum()), float(low), float(high))
