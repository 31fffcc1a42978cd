"""The kinds of rows that are trained on and judged."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """What such rows are called, and what a row has after its prompt."""

    noun: str
    responses: tuple[str, ...]


PAIRS = Rows("pairs", ("chosen", "rejected"))
DEMONSTRATIONS = Rows("demonstrations", ("completion",))
