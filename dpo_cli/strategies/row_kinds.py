"""The kinds of rows for training and evaluation, and of their scores."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """A kind of row: its name, the responses of a row, and the columns of a row in the documented form."""

    noun: str
    responses: tuple[str, ...]
    keys: tuple[str, ...]


PAIRS = Rows("pairs", ("chosen", "rejected"), ("prompt", "chosen", "rejected"))
DEMONSTRATIONS = Rows("demonstrations", ("completion",), ("prompt", "completion"))
RATINGS = Rows("ratings", ("completion",), ("prompt", "completion", "label"))  # answers that are rated good or bad
REWARDS = Rows("rewards", PAIRS.responses, PAIRS.keys)  # a kind of scores: of pairs by a reward model, which has no log-probs

KINDS = {kind.noun: kind for kind in (PAIRS, DEMONSTRATIONS, RATINGS)}  # of rows of a file
