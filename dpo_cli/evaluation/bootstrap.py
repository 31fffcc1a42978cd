"""Intervals: how much a figure could differ on other prompts. No torch: a tally of votes needs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dpo_cli.results.intervals import Interval

Array = NDArray[np.float64]

RESAMPLES, AT_ONCE = 2000, 50
KEPT = 20_000_000  # weights, 160 MB; with more prompts they are drawn again for each figure
# A sum over rows divided by a sum over rows; weights over prompts resample both sums together. Of (n, b) values above, in b
# bins, the sizes of the sums of the bins are added up.
Ratio = tuple[Array, Array]


def mean(values: Array) -> Ratio:
    return values, np.ones_like(values)


def value_of(ratio: Ratio) -> float:
    above, below = ratio
    return float(_whole(above.sum(axis=0), above.ndim == 2) / below.sum())


def _whole(sums: Array, has_bins: bool) -> Array:
    """Sums over rows; if the last axis is bins, the sum of their sizes."""
    sizes: Array = np.abs(sums).sum(axis=-1) if has_bins else sums
    return sizes


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
        above, below = (self._by_prompt(side) for side in ratio)
        has_bins = above.ndim == 2
        ratios = [_whole(weights @ above, has_bins) / (weights @ below) for weights in self.resamples()]
        low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
        return Interval(value_of((above, below)), float(low), float(high))

    def _by_prompt(self, side: Array) -> Array:
        """The sums over the rows of each prompt."""
        sums: list[Array] = [
            np.bincount(self.group, weights=column).astype(np.float64) for column in side.reshape(len(side), -1).T
        ]
        return np.stack(sums, axis=1) if side.ndim == 2 else sums[0]
