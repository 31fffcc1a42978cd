"""A strategy without its trainer: its rows, what its loss needs, its figures, and how an evaluation is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpo_cli.strategies.row_kinds import Rows

if TYPE_CHECKING:
    from dpo_cli.strategies.verdict import Outcome, Verdict


@dataclass(frozen=True)
class Spread:
    """The texts about held-out rows in a report; {below} of {count} are below zero, compared with {base}."""

    title: str
    about: str
    listed: str  # above the lists of the best and the worst


@dataclass(frozen=True)
class Strategy:
    """A way to train. schema.json says which options belong to it; its trainer is in training/."""

    name: str
    method: str  # in words
    rows: Rows
    refers: bool  # the loss compares the policy with a reference
    generates: bool  # answers are sampled while it trains
    is_trained: bool  # by this version
    aligns: bool  # it needs a model that follows instructions
    adapter_rate: float | None  # a learning rate that moves an adapter, if the documented one hardly does
    documented_profile: str | None  # the smallest profile in the documentation
    start_loss: tuple[float, str] | None  # the loss before training
    own_loss: str | None  # the `loss_type` whose value is the figure "loss"
    shown: tuple[str, ...]  # figures that are always shown together
    gains: tuple[str, ...]  # figures shown with their gain, the most important first
    watched: tuple[str, ...]  # figures that an export must not make worse
    health: tuple[str, ...]  # its rules (training/callbacks/health_rules.py)
    spread: Spread
    read: Callable[[Outcome], Verdict]  # figures to a verdict
    rewarded_by: str | None = None  # the strategy that trains its reward model, if the config names none
    distance: tuple[str, ...] = ("kl_token",)  # the figure that every run has of how far the training has moved the model
    mismatches: bool = False  # the loss is measured against answers to other prompts, which is the reference point of KTO
    gives_rewards: bool = False  # the model has a head with one score of a whole response, and writes no answers

    @property
    def sequences(self) -> int:
        """The sequences of a unit of training: the responses of a row, or one sampled answer."""
        return 1 if self.generates else len(self.rows.responses)
