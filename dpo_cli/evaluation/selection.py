"""The best of several settings on one held-out set, and how much better than it is it looks. No torch.

All settings are evaluated on the same prompts, and the best is chosen by its figure on them. That figure is too good: chance
on these prompts has helped the one that is chosen (the optimism of a selection, or winner's curse). The correction is the
bootstrap bias correction of Tsamardinos, Greasidou and Borboudakis, Bootstrapping the out-of-sample predictions for efficient
and accurate cross-validation, Machine Learning 107 (2018), algorithm 4 (BBC-CV): in each resample b of the prompts the best
setting s_b is chosen on the prompts that were drawn, and its figure is taken on those that were not,

    corrected = mean over b of figure(s_b, prompts not in b),    s_b = best over s of figure(s, prompts in b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.evaluation.bootstrap import Array
from dpo_cli.evaluation.pooling import Pooled, Rows, Sums, interval_of
from dpo_cli.results.judgement import RowScores
from dpo_cli.results.settings_swept import Best
from dpo_cli.strategies.figures import FIGURES, Columns
from dpo_cli.strategies.row_kinds import REWARDS
from dpo_cli.strategies.row_kinds import Rows as Kind
from dpo_cli.strategies.strategy import Strategy


@dataclass(frozen=True)
class Criterion:
    """The figure that a choice is by."""

    name: str
    is_gain: bool  # the difference policy - base of it
    is_better_large: bool
    kind: Kind

    @classmethod
    def of(cls, strategy: Strategy) -> Criterion:
        """The first figure of the gains of a strategy: what training changed. Of one without gains, its accuracy.

        For pairs it is the gain in log-prob accuracy. Margin, reward and loss scale with beta, so they cannot compare
        settings of beta, and reward accuracy reaches 1 before a model has changed.
        """
        name = strategy.gains[0] if strategy.gains else strategy.shown[0]
        kind = REWARDS if strategy.gives_rewards else strategy.rows
        return cls(name, bool(strategy.gains), FIGURES[name].is_better_large, kind)

    def rows(self, scores: Sequence[RowScores]) -> Rows:
        """The figure of a run as two sums over its held-out rows, and the prompt of each row."""
        formula = FIGURES[self.name].formulas[self.kind]
        above, below = formula(_columns(scores, of_base=False))
        if self.is_gain:
            above = above - formula(_columns(scores, of_base=True))[0]
        return (above, below), [row.prompt for row in scores]


def _columns(scores: Sequence[RowScores], of_base: bool) -> Columns:
    """What the formulas of log-probs, and of the rewards of a reward model, read."""
    policy, reference, tokens = (
        np.asarray([getattr(row, name) for row in scores], dtype=np.float64) for name in ("policy", "reference", "tokens")
    )
    unknown = np.zeros_like(policy)
    good = np.asarray([row.is_good for row in scores], dtype=np.float64)  # NaN of rows that are not rated
    reward = policy - reference if reference.size else policy
    return Columns(reference if of_base else policy, tokens, unknown, unknown, reward, good)


def best_of(settings: Mapping[str, Rows], is_better_large: bool) -> Best:
    """The best of these settings, with its figure as it is and corrected; of equal ones the first.

    At least one setting, all on the same rows. With one setting, or one prompt, there is no correction. It never makes the
    figure better: that would be chance of the resamples.
    """
    sign = 1.0 if is_better_large else -1.0
    names = list(settings)
    over = Pooled([prompt for _, prompts in settings.values() for prompt in prompts])
    sums = [over.sums([rows], 0) for rows in settings.values()]
    best = int(np.argmax([sign * own.value for own in sums]))
    value = over.of(sums[best])
    tests = {name: over.test("", (names[best], name), sums[best], own) for name, own in zip(names, sums, strict=True)}
    close = [name for name, test in tests.items() if name != names[best] and not test.difference.sign]
    figures = _chosen_elsewhere(over, sums, sign) if len(sums) > 1 else np.zeros(0)
    corrected = None
    if len(figures):
        mean = float(figures.mean())
        corrected = interval_of(sign * min(sign * mean, sign * value.value), figures)
    return Best(names[best], len(names), value, corrected, close)


def _chosen_elsewhere(over: Pooled, sums: Sequence[Sums], sign: float) -> Array:
    """The figure of the setting that a resample chooses on the prompts that it has not drawn: one for each resample.

    A resample that has drawn every prompt gives none.
    """
    above, below = (np.concatenate([getattr(own, side) for own in sums]) for side in ("above", "below"))  # (settings, prompts)
    figures = []
    for drawn in over.resamples():
        left = (drawn == 0).astype(np.float64)
        chosen = np.argmax(sign * _ratio(drawn @ above.T, drawn @ below.T), axis=1)
        figures.append(_ratio(left @ above.T, left @ below.T)[np.arange(len(chosen)), chosen])
    all_figures = np.concatenate(figures)
    known: Array = all_figures[np.isfinite(all_figures)]
    return known


def _ratio(above: Array, below: Array) -> Array:
    return above / np.where(below > 0, below, np.nan)
