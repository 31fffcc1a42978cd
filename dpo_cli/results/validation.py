"""The result of `dpo validate`: the problems of a config, its data and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from dpo_cli.errors import Exit, Problem
from dpo_cli.results.codec import JsonObject


class BillJson(TypedDict):
    """A memory bill in the shape of `--json` and plan.json, in GB."""

    total_gb: float
    components: dict[str, float]
    budget_gb: float | None
    fits: bool | None
    largest_change: str | None


@dataclass(frozen=True)
class Validation:
    """One config, or one of its stages; a config with stages has all problems, and the largest memory."""

    problems: Sequence[Problem]
    config: JsonObject  # every known value
    data: JsonObject | None
    memory: BillJson | None
    exit_code: Exit
    stages: Sequence[Validation] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is an error."""
        return self.exit_code is Exit.DONE

    def to_json(self) -> JsonObject:
        document: JsonObject = {
            "ok": self.ok,
            "problems": [problem.to_json() for problem in self.problems],
            "config": self.config,
            "data": self.data,
            "memory": self.memory,
        }
        return document | ({"stages": [stage.to_json() for stage in self.stages]} if self.stages else {})
