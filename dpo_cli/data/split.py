"""Train and held-out rows, divided by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from dpo_cli.data.formats import Row

R = TypeVar("R", bound=Row)


def split(rows: Sequence[R], share: float, seed: int) -> tuple[list[R], list[R]]:
    """(train, held out): each prompt falls on one side by its own hash, so appended rows move no other row.

    `share` of the prompts are held out in expectation.
    """
    train: list[R] = []
    held_out: list[R] = []
    for row in rows:
        (held_out if is_held_out_prompt(row.prompt_key, share, seed) else train).append(row)
    return train, held_out


def is_held_out_prompt(prompt_key: str, share: float, seed: int) -> bool:
    """On which side a prompt falls."""
    return _position(prompt_key, seed) < share


def _position(prompt: str, seed: int) -> float:
    """A point in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
