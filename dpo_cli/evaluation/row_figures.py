"""An evaluation row by row: each one's figures and place, and those that stand at both ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.data.messages import Text
from dpo_cli.data.tokens import Encoded
from dpo_cli.evaluation.metrics import Scores

EXTREMES = 10


def row_figures(rows: Sequence[Encoded], scores: Scores, beta: float) -> list[dict[str, Any]]:
    """Place and figures of each row: of a pair margin and rewards, of a demonstration its loss with and without training."""
    places = [{"file": Path(row.row.file).name, "line": row.row.line, "category": row.row.category or None} for row in rows]
    if scores.of_pairs:
        rewards = (beta * (scores.policy - scores.reference)).tolist()
        made = [
            {"margin": chosen - rejected, "reward_chosen": chosen, "reward_rejected": rejected} for chosen, rejected in rewards
        ]
    else:
        losses = zip((-scores.policy / scores.tokens)[:, 0], (-scores.reference / scores.tokens)[:, 0], strict=True)
        made = [{"loss": float(policy), "base_loss": float(base)} for policy, base in losses]
    return [{**place, **figures} for place, figures in zip(places, made, strict=True)]


def extremes(rows: Sequence[Encoded], table: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """`best` and `worst`: the rows that training helped most and least, ten each at most, none in both, with their texts."""
    helped = [row["margin"] if "margin" in row else row["base_loss"] - row["loss"] for row in table]
    order = sorted(range(len(table)), key=lambda i: -helped[i])
    count = min(EXTREMES, (len(order) + 1) // 2)
    ends = {"best": order[:count], "worst": order[count:][-EXTREMES:][::-1]}
    return {name: [{**table[i], **_texts(rows[i])} for i in places] for name, places in ends.items()}


def _texts(encoded: Encoded) -> dict[str, str]:
    names = ("chosen", "rejected") if len(encoded.responses) == 2 else ("completion",)
    said = zip(names, encoded.row.responses, strict=True)
    return {"prompt": as_text(encoded.row.prompt), **{name: as_text(text) for name, text in said}}


def as_text(text: Text) -> str:
    """A text to be read: that of a lone message without its role, several with theirs."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)
