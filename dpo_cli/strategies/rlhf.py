"""Reinforcement learning from human feedback: sampled answers, what scores them, and a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.strategies.dpo import DPO
from dpo_cli.strategies.reward import REWARD
from dpo_cli.strategies.row_kinds import PAIRS
from dpo_cli.strategies.strategy import Strategy

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict


def _read(outcome: Outcome) -> Verdict:
    # Imported late: `validate` reads no figures, and must be fast.
    from dpo_cli.results.intervals import required
    from dpo_cli.strategies.figures import number, points
    from dpo_cli.strategies.verdict import Verdict, distance, of_gain, sentence_case, warned

    assert outcome.judged is not None
    kl, is_far = distance(outcome)
    preference = required(outcome.judged.gain, "logp_accuracy")
    by_pairs = (
        f"by its log-probs it prefers the chosen response in {points(preference)} more of the {outcome.rows} held-out pairs"
    )
    gain = outcome.judged.gain.get("answer_reward")
    if gain is None:
        return Verdict(
            "doubtful", "No reward is measured", f"{sentence_case(outcome.who)} has no measured reward; {by_pairs}, and {kl}."
        )
    reward = required(outcome.judged.policy, "answer_reward")
    against = {
        1: f"{number(gain)} above the {outcome.base}'s",
        0: f"not clearly different from the {outcome.base}'s ({number(gain, signed=True)})",
        -1: f"{number(-gain)} below the {outcome.base}'s",
    }[gain.sign]
    claim = f"The answers of {outcome.who} to held-out prompts have a mean reward of {number(reward)}, {against}"
    sentence = f"{claim}; {by_pairs}, and {kl}{warned(outcome)}."
    if gain.sign < 0:
        return Verdict("bad", f"Worse than its {outcome.base}", sentence)
    if gain.sign == 0:
        return Verdict("doubtful", f"No clear gain over its {outcome.base}", sentence)
    return Verdict(*of_gain(outcome, is_far), sentence)


RLHF = Strategy(
    name="rlhf",
    method="reinforcement learning from human feedback",
    rows=PAIRS,
    refers=True,
    generates=True,
    is_trained=True,
    aligns=True,
    adapter_rate=None,
    documented_profile=None,
    start_loss=None,
    own_loss=None,
    shown=("accuracy", "margin", "loss"),
    gains=("logp_accuracy",),
    watched=("accuracy", "margin"),
    health=(
        *("not-finite", "kl", "reward-is-wrong", "no-variance", "reward-hacks-length", "entropy-collapses"),
        *("reward-against-kl", "held-out-reward-falls", "no-movement"),
    ),
    spread=DPO.spread,
    read=_read,
    rewarded_by=REWARD.name,
)
