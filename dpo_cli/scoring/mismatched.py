"""The reference point of KTO: answers to other prompts, on which the policy is compared with its reference. No torch.

The loss of a rating is measured against the KL divergence of the policy from its reference. KTO estimates it by the mean of
log p(y' | x) - log p of the reference, where y' is the answer of another row (arXiv:2402.01306, section 4.2). TRL 1.15 takes
the answer of the row before, within a micro-batch, and for the first row that of the last one (KTOTrainer, `_prepare_dataset`).
Here rows with the same prompt are passed over, since their answers belong to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpo_cli.data.encoded import Encoded
from dpo_cli.data.rows import Rating, Row


def partners(prompts: Sequence[object]) -> list[int]:
    """For each row the place of the nearest row before it, cyclically, with another prompt; of equal prompts the row before."""
    count, found = len(prompts), []
    for place in range(count):
        earlier = ((place - back) % count for back in range(1, count))
        found.append(next((other for other in earlier if prompts[other] != prompts[place]), (place - 1) % count))
    return found


def mismatched_ids(prompt: Sequence[int], answer: Sequence[int], max_length: int) -> list[int]:
    """The start of an answer to another prompt, as far as it fits after this one."""
    return list(answer[: max(1, max_length - len(prompt))])


def with_mismatched(rows: Sequence[Encoded], max_length: int) -> list[Encoded]:
    """Rows with a second response: the answer of another row."""
    others = partners([row.row.prompt_key for row in rows])
    return [
        replace(row, responses=(row.responses[0], mismatched_ids(row.prompt_ids, rows[other].responses[0], max_length)))
        for row, other in zip(rows, others, strict=True)
    ]


def ratings_of(rows: Sequence[Encoded]) -> list[bool]:
    """Whether the answers of these rows are good."""
    return [is_good(row.row) for row in rows]


def is_good(row: Row) -> bool:
    assert isinstance(row, Rating)
    return row.is_good
