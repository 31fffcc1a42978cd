"""The kinds of rows for training and evaluation, and of their scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """A kind of row: its name, and the responses of a row."""

    noun: str
    responses: tuple[str, ...]


PAIRS = Rows("pairs", ("chosen", "rejected"))
DEMONSTRATIONS = Rows("demonstrations", ("completion",))
REWARDS = Rows("rewards", PAIRS.responses)  # a kind of scores: of pairs by a reward model, which has no log-probs
