"""Train and held-out rows, divided by prompt."""

from __future__ import annotations

import hashlib


def is_held_out_prompt(prompt_key: str, share: float, seed: int) -> bool:
    """On which side a prompt falls: by its own hash, so that appended rows move no other row.

    `share` of the prompts are held out in expectation.
    """
    return share > 0 and _position(prompt_key, seed) < share


def _position(prompt: str, seed: int) -> float:
    """A point in [0, 1) that depends on the prompt and the seed alone."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
