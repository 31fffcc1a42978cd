"""Kahneman-Tversky Optimization: answers that are rated good or bad, each alone, and a reference. arXiv:2402.01306."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import RATINGS
from dpo_cli.strategies.strategy import Spread, Strategy

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict

CHANCE = 0.5  # of telling a good answer from a bad one


def _read(outcome: Outcome) -> Verdict:
    # Imported late: `validate` reads no figures, and must be fast.
    from dpo_cli.results.intervals import required
    from dpo_cli.strategies.figures import number, share
    from dpo_cli.strategies.verdict import Verdict, distance, of_gain, sentence_case, warned

    assert outcome.judged is not None
    accuracy, margin, loss = (required(outcome.judged.policy, name) for name in ("accuracy", "margin", "loss"))
    raised = f"{sentence_case(outcome.who)} raises a good answer more than a bad one in {share(accuracy)} of all such pairs"
    by = {1: "by a margin of", 0: "by a margin not clearly above zero,", -1: "with a margin below zero,"}[margin.sign]
    kl, is_far = distance(outcome)
    claim = f"{raised} among {outcome.rows} held-out ratings, {by} {number(margin)} at a loss of {loss.value:.3f}"
    sentence = f"{claim}, and {kl}{warned(outcome)}."
    if margin.sign < 0 or accuracy.high < CHANCE:
        return Verdict("bad", f"Worse than its {outcome.base}", sentence)
    if margin.sign == 0 or accuracy.low <= CHANCE:
        return Verdict("doubtful", f"No clear gain over its {outcome.base}", sentence)
    return Verdict(*of_gain(outcome, is_far), sentence)


KTO = Strategy(
    name="kto",
    method="Kahneman-Tversky Optimization",
    rows=RATINGS,
    refers=True,
    generates=False,
    is_trained=True,
    aligns=True,
    adapter_rate=None,
    documented_profile=None,
    start_loss=(0.5, "1/2"),
    own_loss="kto",
    shown=("accuracy", "margin", "loss"),
    gains=(),
    watched=("accuracy", "margin"),
    health=("not-finite", "kl", "loss-oscillates", "prefers-rejected", "chosen-collapses", "no-movement"),
    spread=Spread(
        "Rewards",
        "The reward of each held-out answer, with its sign turned if the answer is rated bad. {below} of {count} are below "
        "zero: they moved against their rating.",
        "Sorted by that reward. Read the worst first: each is a wrong rating, or something that the model did not learn.",
    ),
    read=_read,
    mismatches=True,
)
