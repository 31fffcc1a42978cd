"""Supervised fine-tuning: demonstrations, and no reference in the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import DEMONSTRATIONS
from dpo_cli.strategies.strategy import Spread, Strategy

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict


def _read(outcome: Outcome) -> Verdict:
    # Imported late: `validate` reads no figures, and must be fast.
    from dpo_cli.results.intervals import required
    from dpo_cli.strategies.figures import number, points, share
    from dpo_cli.strategies.verdict import Verdict, distance, of_gain, warned

    assert outcome.judged is not None
    policy_loss, policy_right = (required(outcome.judged.policy, name) for name in ("loss", "token_accuracy"))
    loss, right = (required(outcome.judged.gain, name) for name in ("loss", "token_accuracy"))
    fell = {
        -1: f"below the {outcome.base}'s by {number(-loss)}",
        0: f"not clearly different from the {outcome.base}'s ({number(loss, signed=True)})",
        1: f"above the {outcome.base}'s by {number(loss)}",
    }[loss.sign]
    whose = "model's" if outcome.whole else "adapter's"
    kl, is_far = distance(outcome)
    sentence = (
        f"On {outcome.rows} held-out demonstrations the {whose} loss is {number(policy_loss)} nats per token, {fell}; "
        f"{share(policy_right)} of their tokens are its most likely ones ({points(right)}), and {kl}{warned(outcome)}."
    )
    if loss.sign > 0:
        return Verdict("bad", f"Worse than its {outcome.base}", sentence)
    if loss.sign == 0:
        return Verdict("doubtful", f"No clear gain over its {outcome.base}", sentence)
    return Verdict(*of_gain(outcome, is_far), sentence)


SFT = Strategy(
    name="sft",
    method="supervised fine-tuning",
    rows=DEMONSTRATIONS,
    refers=False,
    generates=False,
    is_trained=True,
    aligns=False,
    adapter_rate=None,
    documented_profile=None,
    start_loss=None,
    own_loss=None,
    shown=("loss", "token_accuracy"),
    gains=("loss", "token_accuracy"),
    watched=("loss",),
    health=("not-finite", "loss-oscillates", "loss-rises", "no-movement"),
    spread=Spread(
        "Gain of each demonstration",
        "The {base}'s loss minus the {who}'s, nats per token. {below} of {count} got worse.",
        "Sorted by how far the loss fell below the {base}'s, nats per token.",
    ),
    read=_read,
)
