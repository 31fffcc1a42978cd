"""How long each method of a comparison trains, so that all take the same tokens, seconds or epochs.

epochs   num_train_epochs of each method: exact.
tokens   max_steps, from the tokens of a mean step by the plan: exact to half a step, and to how far the steps that are
         trained differ from the mean. A method that samples what it trains on has no such plan: it is tried first.
seconds  max_steps, from the seconds of a mean step of a trial of `TRIAL_STEPS` steps, a run of its own. Training is not
         cut at a time, since then the learning rate would not fall to its end, and no two trainings would be the same.

A method of several stages divides the budget evenly among them. What a run really took is in the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_cli.commands.session import composer_for
from dpo_cli.config.config import Loaded
from dpo_cli.errors import invalid
from dpo_cli.hardware.machine import Machine
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.plan import Plan
from dpo_cli.plan.preflight import Inspection
from dpo_cli.plan.tokenized import prepare
from dpo_cli.storage.log import Tell
from dpo_cli.storage.run_directory import RunDirectory

TRIAL_STEPS = 8
Ends = list[dict[str, object]]  # how long each stage trains, as keys of a config


@dataclass(frozen=True)
class Budget:
    """The option `compare`: a budget of this kind, with a value unless the methods' own lengths decide it."""

    kind: str  # tokens, seconds or epochs
    value: float | None

    def amount(self, plans: Mapping[str, Sequence[Plan]]) -> float:
        """The value; without one the most that a method takes by its own length."""
        if self.value is not None:
            return self.value
        stages = list(plans.values())
        if self.kind == "epochs":
            return max(sum(plan.config.num_train_epochs for plan in own) for own in stages)
        tokens = max(sum(map(_own_tokens, own)) for own in stages)
        if any(plan.strategy.generates for plan in max(stages, key=lambda own: sum(map(_own_tokens, own)))) or not tokens:
            message = '"compare": how many tokens a method that samples answers takes is not known before it trains'
            raise invalid("budget-missing", message, 'add "budget_value": 100000 to "compare"', "compare")
        return tokens

    def ends(self, amount: float, stages: Sequence[Plan], tried: Callable[[], Sequence[Path]]) -> Ends:
        """How long the stages of a method train; `tried` gives the runs of a trial, one per stage."""
        own = amount / len(stages)
        if self.kind == "epochs":
            return [{"num_train_epochs": own}] * len(stages)
        if self.kind == "tokens" and not any(plan.strategy.generates for plan in stages):
            rates = [_tokens_of_step(plan) for plan in stages]
        else:
            rates = [_measured(run, self.kind) for run in tried()]
        return [{"max_steps": max(1, round(own / rate))} for rate in rates]


def _tokens_of_step(plan: Plan) -> float:
    """Of a mean step: the tokens of all sequences, which a run counts too (`tokens` in metrics.jsonl)."""
    assert plan.counts is not None
    batches = math.ceil(plan.counts.train_pairs / plan.config.per_device_train_batch_size)
    return plan.counts.train_tokens / math.ceil(batches / plan.config.gradient_accumulation_steps)


def _own_tokens(plan: Plan) -> float:
    """What a stage trains on by its own config; 0 if that is known only while it samples."""
    return 0.0 if plan.strategy.generates else _tokens_of_step(plan) * plan.total_steps


def _measured(run: Path, what: str) -> float:
    """The tokens or the seconds of a mean step of a run."""
    lines = [line for line in RunDirectory(run).read_lines() if line["split"] == "train"]
    if what == "tokens":
        return float(lines[-1]["tokens"]) / int(lines[-1]["step"])
    tokens = [0, *(line["tokens"] for line in lines)]  # without the time of probes, checkpoints and evaluations
    seconds = [(now - before) / line["tokens_per_second"] for before, now, line in zip(tokens, tokens[1:], lines, strict=False)]
    return float(sum(seconds)) / int(lines[-1]["step"])


def plans_of(stages: Sequence[tuple[Loaded, Inspection]], machine: Machine, tell: Tell) -> list[Plan]:
    """The plans of a method's stages, with the counts of their rows."""
    composer_for([inspection.require()[1].config for _, inspection in stages])
    from dpo_cli.providers.registry import PROVIDERS

    plans = []
    for loaded, inspection in stages:
        data, draft = inspection.require()
        provider = PROVIDERS[draft.config.provider](draft.model)
        prepared = prepare(data, provider.tokenizer(), draft, provider.token_rows(), tell)
        plans.append(resolve(loaded.on_foundation(), machine, prepared.counts, model=draft.model))
    return plans
