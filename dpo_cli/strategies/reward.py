"""A reward model on pairs: a score of a whole response. The first stage of reinforcement learning from human feedback."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import PAIRS
from dpo_cli.strategies.strategy import Spread, Strategy

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict

CHANCE = 0.5  # of ranking a pair as labelled


def _read(outcome: Outcome) -> Verdict:
    # Imported late: `validate` reads no figures, and must be fast.
    from dpo_cli.results.intervals import required
    from dpo_cli.strategies.figures import number, share
    from dpo_cli.strategies.verdict import Verdict, warned

    assert outcome.judged is not None
    names = ("accuracy", "margin", "loss", "calibration_error")
    accuracy, margin, loss, error = (required(outcome.judged.policy, name) for name in names)
    ranks = (
        f"The reward model gives the chosen response the larger reward in {share(accuracy)} of {outcome.rows} held-out pairs"
    )
    judged = f"by a margin of {number(margin)} at a loss of {loss.value:.3f}; its confidence is off by {number(error)}"
    sentence = f"{ranks}, {judged}{warned(outcome)}."
    if accuracy.high < CHANCE:
        return Verdict("bad", "Worse than chance", sentence)
    if accuracy.low <= CHANCE:
        return Verdict("doubtful", "No better than chance", sentence)
    if outcome.warnings:
        return Verdict("doubtful", "Better than chance, with a warning", sentence)
    return Verdict("good", "Better than chance", sentence)


REWARD = Strategy(
    name="reward",
    method="Bradley-Terry reward modelling",
    rows=PAIRS,
    refers=False,
    generates=False,
    is_trained=True,
    aligns=False,
    adapter_rate=None,
    documented_profile=None,
    start_loss=None,
    own_loss=None,
    shown=("accuracy", "margin", "loss", "calibration_error"),
    gains=(),
    watched=(),
    health=("not-finite", "loss-oscillates", "loss-rises", "all-right-early", "chance-level", "no-movement"),
    spread=Spread(
        "Margins",
        "The margin of each held-out pair. {below} of {count} are below zero: the rejected response has the larger reward.",
        "Sorted by margin. Read the worst first: each is a wrong label, or something that the reward model did not learn.",
    ),
    read=_read,
    distance=(),
    gives_rewards=True,
)
