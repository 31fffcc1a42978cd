"""What a way to train is, apart from its trainer: its rows, what its loss needs, its figures, and how an evaluation is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import Rows

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict


@dataclass(frozen=True)
class Spread:
    """The words over the held-out rows in a report; {below} of {count} are below zero, compared with {base}."""

    title: str
    about: str
    listed: str  # over the lists of the best and the worst


@dataclass(frozen=True)
class Strategy:
    """A way to train. What an option has to do with it stands in schema.json, its trainer in training/."""

    name: str
    method: str  # in words
    rows: Rows
    refers: bool  # the loss compares the policy with a reference
    generates: bool  # answers are sampled while it trains
    is_trained: bool  # by this version
    aligns: bool  # it starts from a model that follows instructions
    adapter_rate: float | None  # where the documented learning rate hardly moves an adapter, one that does
    documented_profile: str | None  # the smallest that the documentation names for it
    start_loss: tuple[float, str] | None  # where nothing has moved
    shown: tuple[str, ...]  # the figures that are never shown without each other
    gains: tuple[str, ...]  # those whose gain goes with them, the first of them first
    watched: tuple[str, ...]  # the figures that an export may not make worse
    health: tuple[str, ...]  # the rules that watch it (training/callbacks/health_rules.py)
    spread: Spread
    read: Callable[[Outcome], Verdict]  # figures to a verdict
