"""The kinds of rows for training and evaluation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """A kind of row: its name, and the responses of a row."""

    noun: str
    responses: tuple[str, ...]


PAIRS = Rows("pairs", ("chosen", "rejected"))
DEMONSTRATIONS = Rows("demonstrations", ("completion",))
