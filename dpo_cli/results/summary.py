"""The result of `dpo train`: the lines of metrics.jsonl, the health events, and the summary in metrics.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dpo_cli.results.codec import JsonObject, from_json, object_of, to_json
from dpo_cli.results.intervals import Sides

Split = Literal["train", "eval"]
Action = Literal["note", "warn", "stop"]
Status = Literal["completed", "interrupted", "unhealthy"]
PLACES = ("split", "step", "epoch")  # the keys of a line that are not figures


@dataclass(frozen=True)
class Line:
    """A line of metrics.jsonl: a logged step, or an evaluation after one."""

    split: Split
    step: int
    epoch: float
    figures: dict[str, float]  # NaN (null in JSON) if one is not finite

    def to_json(self) -> JsonObject:
        return {"split": self.split, "step": self.step, "epoch": self.epoch, **self.figures}

    @classmethod
    def of_json(cls, value: object) -> Line:
        """The line in a JSON value; `ValueError` with the keys that are missing."""
        return from_json(cls, _nested(value))


def _nested(value: object) -> JsonObject:
    """JSON of a `Line` in the shape of its fields; a later version may add keys that are not numbers."""
    given = object_of(value)
    places = {name: given[name] for name in PLACES if name in given}
    rest = {name: figure for name, figure in given.items() if name not in PLACES}
    figures = {name: figure for name, figure in rest.items() if figure is None or isinstance(figure, int | float)}
    return {**places, "figures": figures}


@dataclass(frozen=True)
class Event:
    """The finding of a health rule: shown and kept; the action "stop" ends the training (exit code 5)."""

    rule: str
    action: Action
    step: int
    message: str
    remedy: str

    def text(self) -> str:
        return f"{self.action} [{self.rule}] {self.message}\n  {self.remedy}"


@dataclass(frozen=True)
class Memory:
    """The peak memory of a training, GB: as the plan billed it, and as it was measured."""

    predicted_gb: float | None = None
    measured_gb: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The content of metrics.json: how a training ended, and its figures on held-out rows."""

    status: Status
    steps: int
    best_step: int | None = None
    seconds: float  # from the first log-prob of the reference to the last step
    train: Line | None = None  # the last line
    sides: Sides | None  # `eval`, `base` and `gain` in JSON
    memory: Memory = Memory()
    health: Sequence[Event]
    adapter_sha256: str = ""

    def to_json(self) -> JsonObject:
        return {
            "status": self.status,
            "steps": self.steps,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "train": self.train.to_json() if self.train else None,
            "eval": self._side("policy"),
            "base": self._side("base"),
            "gain": self._side("gain"),
            "memory": to_json(self.memory),
            "health": [to_json(event) for event in self.health],
            "adapter_sha256": self.adapter_sha256,
        }

    def _side(self, side: str) -> JsonObject | None:
        return to_json(self.sides.of(side)) if self.sides else None

    @classmethod
    def of_json(cls, value: object) -> RunSummary:
        """The summary in a JSON value; `ValueError` with the keys that are missing."""
        given = object_of(value, "eval", "base", "gain", "seconds")
        sides = {"policy": given["eval"], "base": given["base"], "gain": given["gain"]} if given["eval"] is not None else None
        line = _nested(given["train"]) if given.get("train") else None
        summary = from_json(cls, {**given, "sides": sides, "train": line, "memory": given.get("memory") or {}})
        if not math.isfinite(summary.seconds):
            raise ValueError("seconds is not a number")
        return summary
