"""Direct Preference Optimization: pairs, and a reference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import PAIRS
from dpo_cli.strategies.strategy import Spread, Strategy

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict


def _read(outcome: Outcome) -> Verdict:
    # Imported late: `validate` reads no figures, and must be fast.
    from dpo_cli.results.intervals import required
    from dpo_cli.strategies.figures import number, points, share
    from dpo_cli.strategies.verdict import Verdict, distance, of_gain, sentence_case, warned

    assert outcome.judged is not None
    accuracy, margin, loss = (required(outcome.judged.policy, name) for name in ("accuracy", "margin", "loss"))
    gain = required(outcome.judged.gain, "logp_accuracy")
    prefers = f"{sentence_case(outcome.who)} prefers the chosen response in {share(accuracy)} of {outcome.rows} held-out pairs"
    by = {1: "by a margin of", 0: "by a margin not clearly above zero,", -1: "with a margin below zero,"}[margin.sign]
    changed = {
        1: f"prefers it in {points(gain, signed=False)} more of the pairs than the {outcome.base} does",
        0: f"does not clearly prefer it in more pairs than the {outcome.base} does, {points(gain)}",
        -1: f"prefers it in {points(-gain, signed=False)} fewer of the pairs than the {outcome.base} does",
    }[gain.sign]
    kl, is_far = distance(outcome)
    claim = f"{prefers}, {by} {number(margin)} at a loss of {loss.value:.3f}; by its log-probs it {changed}"
    sentence = f"{claim}, and {kl}{warned(outcome)}."
    if margin.sign < 0 or gain.sign < 0:
        return Verdict("bad", f"Worse than its {outcome.base}", sentence)
    if margin.sign == 0:
        return Verdict("doubtful", "No clear effect", sentence)
    if gain.sign == 0:
        return Verdict("doubtful", f"No clear gain over its {outcome.base}", sentence)
    return Verdict(*of_gain(outcome, is_far), sentence)


DPO = Strategy(
    name="dpo",
    method="Direct Preference Optimization",
    rows=PAIRS,
    refers=True,
    generates=False,
    is_trained=True,
    aligns=True,
    adapter_rate=2e-4,
    documented_profile="mid_range",
    start_loss=(math.log(2), "ln 2"),
    own_loss="sigmoid",
    shown=("accuracy", "margin", "loss"),
    gains=("logp_accuracy",),
    watched=("accuracy", "margin"),
    health=(
        *("not-finite", "kl", "loss-oscillates", "prefers-rejected", "all-right-early"),
        *("chosen-collapses", "chosen-falls", "no-movement"),
    ),
    spread=Spread(
        "Margins",
        "The margin of each held-out pair. {below} of {count} are below zero: the rejected response is preferred.",
        "Sorted by margin. Read the worst first: each is a wrong label, or something that the model did not learn.",
    ),
    read=_read,
)
