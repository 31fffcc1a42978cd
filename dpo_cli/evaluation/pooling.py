"""Figures of a method over its seeds and the held-out prompts, and tests between methods. No torch.

All runs are evaluated on the same prompts, so seeds and prompts are crossed. A resample draws seeds and, apart from them,
prompts, each with replacement, and a run's figure of a prompt counts as often as its seed times its prompt: the pigeonhole
bootstrap (Owen, The pigeonhole bootstrap, Annals of Applied Statistics 1 (2007)). With one seed it is that over prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from dpo_cli.evaluation.bootstrap import RESAMPLES, Array, Intervals, Ratio, mean
from dpo_cli.results.intervals import Interval
from dpo_cli.results.methods_compared import PairTest, ScoredRun
from dpo_cli.strategies.figures import FIGURES, Columns
from dpo_cli.strategies.row_kinds import PAIRS

OF_PAIRS = ("logp_accuracy", "normalized_logp_accuracy", "kl_token")  # the figures of pairs that every method has
Rows = tuple[Ratio, Sequence[str]]  # a figure of one run: its two sums, row by row, and the prompt of each row


def rows_of(run: ScoredRun) -> dict[str, Rows]:
    """The figures of a run; `gain` is its log-prob accuracy minus that of the base on the same pair."""
    policy, base = (_of_pairs(run, log_probs) for log_probs in (run.policy, run.reference))
    right, of_base = policy["logp_accuracy"], base["logp_accuracy"]
    gain = (right[0] - of_base[0], right[1])
    rows: dict[str, Rows] = {name: (ratio, run.prompts) for name, ratio in {**policy, "gain": gain}.items()}
    answers = {"kl_sequence": run.kl_sequence, "answer_tokens": run.answer_tokens, "win_rate": run.wins}
    return rows | {name: _of_answers(values) for name, values in answers.items() if len(values)}


def rows_of_base(run: ScoredRun) -> dict[str, Rows]:
    """The same of the base alone."""
    ratios = _of_pairs(run, run.reference)
    rows: dict[str, Rows] = {name: (ratios[name], run.prompts) for name in OF_PAIRS if PAIRS in FIGURES[name].alone}
    return rows | ({"answer_tokens": _of_answers(run.base_answer_tokens)} if len(run.base_answer_tokens) else {})


def _of_pairs(run: ScoredRun, log_probs: Sequence[Sequence[float]]) -> dict[str, Ratio]:
    model, tokens, kl = (np.asarray(values, dtype=np.float64) for values in (log_probs, run.tokens, run.kl))
    columns = Columns(model, tokens, np.zeros_like(model), kl, np.zeros_like(model))
    return {name: FIGURES[name].formulas[PAIRS](columns) for name in OF_PAIRS}


def _of_answers(values: Sequence[float]) -> Rows:
    """Answers to the first prompts, which are in the same order in all runs."""
    return mean(np.asarray(values, dtype=np.float64)), [str(place) for place in range(len(values))]


@dataclass(frozen=True)
class Sums:
    """A figure of several runs of a method: above / below, both summed over (seeds, prompts)."""

    above: Array
    below: Array
    seeds: int  # decides which seeds a resample draws: another number for each method

    @property
    def value(self) -> float:
        return float(self.above.sum() / self.below.sum())


class Pooled:
    """Intervals over seeds and prompts. Resamples draw the same prompts for every method, so that differences are paired."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.names = sorted(set(prompts))
        self._intervals = Intervals(self.names)

    def sums(self, runs: Sequence[Rows], seeds: int) -> Sums:
        place = {name: number for number, name in enumerate(self.names)}
        above, below = [], []
        for (top, bottom), prompts in runs:
            group = [place[prompt] for prompt in prompts]
            above.append(np.bincount(group, weights=top, minlength=len(place)))
            below.append(np.bincount(group, weights=bottom, minlength=len(place)))
        return Sums(np.stack(above), np.stack(below), seeds)

    def resampled(self, sums: Sums) -> Array:
        """The figure in each resample."""
        count = len(sums.above)
        drawn = np.random.default_rng([1, sums.seeds]).integers(count, size=(RESAMPLES, count))
        seeds = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float64)
        parts, start = [], 0
        for prompts in self._intervals.resamples():
            weights = seeds[start : start + len(prompts)]
            above, below = (((prompts @ side.T) * weights).sum(axis=1) for side in (sums.above, sums.below))
            parts.append(above / np.where(below > 0, below, np.nan))
            start += len(prompts)
        return np.concatenate(parts)

    def resamples(self) -> Iterable[Array]:
        """How often each prompt is in a resample, (some, prompts), for all resamples."""
        return self._intervals.resamples()

    def of(self, sums: Sums) -> Interval:
        return interval_of(sums.value, self.resampled(sums))

    def test(self, figure: str, names: tuple[str, str], one: Sums, other: Sums) -> PairTest:
        """The difference of two methods, and twice the smaller share of resamples on either side of zero.

        Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 15: the achieved significance level. It is below
        5 % where the interval is clear of zero.
        """
        apart = self.resampled(one) - self.resampled(other)
        apart = apart[np.isfinite(apart)]
        beyond = min(int((apart <= 0).sum()), int((apart >= 0).sum()))
        p = min(1.0, 2 * (beyond + 1) / (len(apart) + 1))
        return PairTest(figure, *names, interval_of(one.value - other.value, apart), p, p)


def interval_of(value: float, resampled: Array) -> Interval:
    if not np.isfinite(value):
        return Interval(value, value, value)
    low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
    return Interval(value, float(low), float(high))


def pooled(methods: Mapping[str, Sequence[Mapping[str, Rows]]]) -> dict[str, dict[str, Interval]]:
    """The figures of each method, from those of its runs."""
    figures: dict[str, dict[str, Interval]] = {name: {} for name in methods}
    for figure, over, sums in _by_figure(methods):
        for name, own in sums.items():
            figures[name][figure] = over.of(own)
    return figures


def pair_tests(methods: Mapping[str, Sequence[Mapping[str, Rows]]], compared: Sequence[str]) -> list[PairTest]:
    """Every two methods by each of the `compared` figures that both have, with p-values corrected for their number."""
    made = [
        over.test(figure, (one, other), sums[one], sums[other])
        for figure, over, sums in _by_figure(methods)
        if figure in compared
        for one, other in combinations(sums, 2)
    ]
    corrected = holm([test.p for test in made])
    return [replace(test, p_corrected=p) for test, p in zip(made, corrected, strict=True)]


def _by_figure(
    methods: Mapping[str, Sequence[Mapping[str, Rows]]],
) -> list[tuple[str, Pooled, dict[str, Sums]]]:
    """Each figure with its intervals, and its sums of the methods that have it in all their runs."""
    found = []
    for figure in dict.fromkeys(name for runs in methods.values() for run in runs for name in run):
        rows = {
            name: [run[figure] for run in runs] for name, runs in methods.items() if runs and all(figure in r for r in runs)
        }
        if not rows:
            continue
        over = Pooled([prompt for runs in rows.values() for _, prompts in runs for prompt in prompts])
        numbers = {name: number for number, name in enumerate(methods)}
        found.append((figure, over, {name: over.sums(runs, numbers[name]) for name, runs in rows.items()}))
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in the same order.

    The smallest of m is multiplied by m, the next by m - 1, and so on; none becomes smaller than the one before it.
    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = least
    return corrected
