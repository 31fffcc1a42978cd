"""Train and held-out pairs, divided by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from dpo_cli.data.formats import Pair


def split(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, held out): each prompt falls on one side by its own hash, so appended rows move no other row.

    `share` of the prompts are held out in expectation.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in pairs:
        (held_out if is_held_out_prompt(pair.prompt_key, share, seed) else train).append(pair)
    return train, held_out


def is_held_out_prompt(prompt_key: str, share: float, seed: int) -> bool:
    """On which side a prompt falls."""
    return _position(prompt_key, seed) < share


def _position(prompt: str, seed: int) -> float:
    """A point in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
