"""What scores the answers that rlhf samples: a reward model, rules, or both, added up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dpo_cli.config.reward_rules import reward_functions
from dpo_cli.config.schema import inner_defaults
from dpo_cli.data.rows import Question
from dpo_cli.errors import RunFailed
from dpo_cli.evaluation.generation import Answer, Rank
from dpo_cli.plan.plan import Plan
from dpo_cli.preferences.ranking import RELATIVE, ranking
from dpo_cli.storage.world import ALONE, World


class SummedRewards:
    """The weighted sum of the ways to score of a plan. A `Rank`: it scores the answers to one question together."""

    def __init__(self, parts: Sequence[tuple[float, Rank]], is_relative: bool = False, world: World = ALONE) -> None:
        self.parts, self.is_relative, self.world = parts, is_relative, world  # each part with its weight

    @classmethod
    def of(cls, plan: Plan, world: World = ALONE) -> SummedRewards:
        """Those of the options `reward_model` and `reward_functions`, with the model loaded if there is one."""
        config, defaults = plan.config, inner_defaults("augment")
        functions = reward_functions(config.reward_functions)
        if config.reward_model is not None:
            functions.insert(0, {"rank": "reward", "reward_model": config.reward_model, "weight": 1.0})
        dtype = getattr(torch, plan.dtype)
        needed = functions if world.is_main else []
        parts = [(one["weight"], ranking({**defaults, **one}, config.device, dtype, plan.day)) for one in needed]
        return cls(parts, any(one["rank"] in RELATIVE for one in functions), world)

    @property
    def absolute(self) -> SummedRewards | None:
        """Itself if an answer has a score without others to compare it with; else None."""
        return None if self.is_relative else self

    def __call__(self, question: Question, answers: Sequence[Answer]) -> list[float]:
        """A score per answer; a larger one is better. Raises `RunFailed` for a score that is not a finite number.

        Of several processes the first one scores: a judge is asked, and paid, once.
        """
        return self.world.same(lambda: self._scores(question, answers))

    def _scores(self, question: Question, answers: Sequence[Answer]) -> list[float]:
        columns = [[weight * score for score in rank(question, answers)] for weight, rank in self.parts]
        totals = [sum(scores) for scores in zip(*columns, strict=True)]
        if not all(map(math.isfinite, totals)):
            message = f"the reward of an answer to {question.file}:{question.line} is not a finite number"
            raise RunFailed(message, "check the reward model: `dpo eval` on its run, or another dtype")
        return totals
