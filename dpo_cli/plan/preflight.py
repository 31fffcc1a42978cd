"""All checks of a config before torch is imported: config, data, model and hardware together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_cli.config.augment_rules import RANK_FIX
from dpo_cli.config.config import Loaded
from dpo_cli.config.options import Config
from dpo_cli.config.reward_rules import reward_functions
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.data.prompts import Prompts, read_prompts, without_reference
from dpo_cli.errors import DoesNotFit, Exit, InvalidInput, Problem
from dpo_cli.hardware.machine import Machine
from dpo_cli.models import checks, remote_code, target_layers
from dpo_cli.models.adapter_config import ADAPTER_CONFIG
from dpo_cli.models.model_files import CONFIG
from dpo_cli.models.source import ModelSource
from dpo_cli.plan import adapter_start
from dpo_cli.plan.decisions import resolve
from dpo_cli.plan.examination import Data, examine
from dpo_cli.plan.feasibility import DOES_NOT_FIT, NO_ROOM, disk_problem, does_not_fit, hardware_problems
from dpo_cli.plan.plan import Plan
from dpo_cli.storage.run_directory import SUMMARY, RunDirectory, config_of_run, run_of
from dpo_cli.strategies.strategies import STRATEGIES


@dataclass(frozen=True)
class Inspection:
    """The result of all checks before torch is imported: every problem, the data, and the plan if there is one."""

    problems: tuple[Problem, ...]
    data: Data | None
    plan: Plan | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def only_misfit(self) -> bool:
        """Whether all errors are about the hardware."""
        return bool(self.errors) and all(problem.code in (DOES_NOT_FIT, NO_ROOM) for problem in self.errors)

    @property
    def exit_code(self) -> Exit:
        return Exit.DONE if not self.errors else Exit.UNFIT if self.only_misfit else Exit.INVALID

    def stricter(self, when: Callable[[Problem], bool]) -> Inspection:
        """The same with the selected warnings as errors."""
        stopped = [replace(p, severity="error") if p.severity == "warning" and when(p) else p for p in self.problems]
        return replace(self, problems=tuple(stopped))

    def require(self) -> tuple[Data, Plan]:
        """The data and the plan, or an exception with every problem."""
        plan = self.require_plan()
        if self.data is None:
            raise InvalidInput(self.problems)
        return self.data, plan

    def require_plan(self) -> Plan:
        """The plan without the data, or an exception with every problem."""
        if self.plan is not None and not self.errors:
            return self.plan
        raise (DoesNotFit if self.only_misfit else InvalidInput)(self.problems)


def inspect(
    loaded: Loaded,
    machine: Machine,
    vram_gb: float | None = None,
    with_data: bool = True,
    with_fit: bool = True,
    rendered_rows: int = 0,
    is_begun: bool = False,
) -> Inspection:
    """Check config, data, model and hardware together, so that one call reports every problem.

    Without `with_fit` the memory is not checked: a training checks it later, with the real lengths. Up to `rendered_rows` rows
    go through the chat template and the tokenizer; a training does that later with all rows. The plan of a started run
    (`is_begun`) keeps its decided values.
    """
    found = list(loaded.problems)
    wrong = {problem.key for problem in found if problem.severity == "error"}
    name = loaded.values.get("model_name") if "model_name" not in wrong else None
    model = ModelSource.of(name) if isinstance(name, str) else None
    strategy = STRATEGIES.get(str(loaded.values.get("strategy")))
    about_model = list(checks.problems(model, to_align=strategy is not None and strategy.aligns)) if model is not None else []
    found += map(loaded.placed, about_model)
    damaged = any(problem.severity == "error" for problem in about_model)
    data, pairs = None, 0
    if with_data:
        examined = examine(loaded, model, wrong, rendered_rows)
        data, pairs = examined.data, examined.epoch_pairs
        found += [problem if problem.file else loaded.placed(problem) for problem in examined.problems]
    plan = None
    draft = loaded.draft()
    if draft.config is not None and not damaged:
        longest = data.longest if data else None
        plan = resolve(draft, machine, vram_gb=vram_gb, longest=longest, is_resumed=is_begun, model=model)
        found += map(loaded.placed, hardware_problems(plan, machine, vram_gb))
        found += map(
            loaded.placed, adapter_start.problems(draft, model or plan.model, plan.run_dir)
        )  # with the names of the config
        found += map(loaded.placed, _model_problems(plan))
        found += map(loaded.placed, () if is_begun else _reward_problems(draft))  # a run is opened without it too
        if with_data and plan.strategy.generates and draft.config.prompts_file is not None:
            found += _prompts_problems(draft.config)
        if plan.config.lora_r and not plan.goes_on:
            found += map(loaded.placed, target_layers.problems(plan.config, plan.model, plan.model_label))
        found += map(loaded.placed, step_problems(plan, pairs))
        if with_fit and (misfit := does_not_fit(plan)) is not None:
            if vram_gb is None and not machine.gpus:  # a config for a GPU is often checked on a machine without one
                misfit = replace(misfit, severity="warning", stops_training=True)
            found.append(loaded.placed(misfit))
        if with_fit and vram_gb is None and (lack := disk_problem(plan)) is not None:
            found.append(loaded.placed(replace(lack, severity="warning", stops_training=True)))
    return Inspection(tuple(found), data, plan)


def inspect_prompts(loaded: Loaded, machine: Machine, path: str) -> tuple[Plan, Prompts, list[Problem]]:
    """Check config and prompts of an augmentation, without a dataset: the plan, the prompts, and the warnings."""
    draft = loaded.draft().alone()
    inspection = inspect(draft, machine, with_data=False, with_fit=False).stricter(lambda problem: problem.stops_training)
    prompts = read_prompts(path, draft.values.get("columns"), draft.values.get("on_bad_rows") == "skip")
    found = [*inspection.problems, *prompts.problems]
    rank = inspection.plan.config.augment.get("rank") if inspection.plan else None
    if rank is None and not inspection.errors:
        found.append(draft.placed(Problem("error", "rank-missing", '"augment" has no "rank"', RANK_FIX, "augment")))
    if rank == "reference":
        found += without_reference(prompts, path)
    if inspection.plan is None or any(problem.severity == "error" for problem in found):
        raise InvalidInput(found)
    return inspection.plan, prompts, [problem for problem in found if problem.severity == "warning"]


def _prompts_problems(config: Config) -> Iterator[Problem]:
    """The problems of a file of prompts, also that what scores the answers needs a reference."""
    prompts = read_prompts(str(config.prompts_file), config.columns, config.on_bad_rows == "skip")
    yield from prompts.problems
    if any(function["rank"] == "reference" for function in reward_functions(config.reward_functions)):
        yield from without_reference(prompts, str(config.prompts_file))


def _reward_problems(loaded: Loaded) -> Iterator[Problem]:
    """A reward model that is not there, or that is not a reward model; not one that a stage before it trains."""
    config = loaded.require()
    fix = "name the directory of a reward model; a config without stages may remove the key: then rlhf trains one first"
    if config.reward_model is not None and loaded.rewarded_by is None:
        yield from _no_reward_model(config.reward_model, fix)


def _no_reward_model(name: str, fix: str) -> Iterator[Problem]:
    """Why what is named so cannot give rewards, as far as it can be seen without its weights."""
    run, path = config_of_run(name), Path(name)
    strategy = STRATEGIES.get(str(run.get("strategy"))) if run else None
    if not os.path.exists(name) and not is_hub_id(name):
        yield Problem("error", "reward-model-missing", f"there is no reward model {name}", fix, "reward_model")
        return
    kinds = ModelSource.of(name).own.sound(CONFIG).get("architectures") if (path / CONFIG).is_file() and not run else None
    why = None
    if strategy is not None and not strategy.gives_rewards:
        why = f"it is a run of strategy {strategy.name}, which trains no reward model"
    elif run and not RunDirectory(run_of(name)).has(SUMMARY):
        why = "its run is not finished"
    elif isinstance(kinds, list) and not any("SequenceClassification" in str(kind) for kind in kinds):
        why = f"it is a {kinds[0] if kinds else 'model'}, which has no head with one score"
    elif path.exists() and not run and not any((path / file).is_file() for file in (CONFIG, ADAPTER_CONFIG)):
        why = "it is neither a model nor an adapter"
    if why is not None:
        yield Problem("error", "not-a-reward-model", f"{name} is not a reward model: {why}", fix, "reward_model")


def _model_problems(plan: Plan) -> Iterator[Problem]:
    """Options of a config that the model does not support, by its shape."""
    config, model = plan.config, plan.model
    facts, family = model.facts, model.files.config.get("model_type") if model.files.has(CONFIG) else None
    if plan.strategy.gives_rewards and not remote_code.is_classifier(family):
        yield checks.no_classifier(plan.model_label, str(family))
    if (stored := model.files.quantisation) is not None and not plan.merges:
        yield from stored.problems(plan.model_label, config.use_4bit, config.use_8bit, config.lora_r)
    if config.lora_r == 0 and model.files.is_mixture:
        message = "lora_r 0 also trains the routers of this mixture of experts, without the loss that balances its experts"
        fix = 'write "lora_r": 16: an adapter does not change the routers'
        yield Problem("hint", "router-unbalanced", message, fix, "lora_r")
    if facts is None:
        return
    context = facts.max_position_embeddings
    if context is not None and config.max_seq_length > context:
        message = f"{plan.model_label} supports {context} tokens, but max_seq_length is {config.max_seq_length}"
        stretches = config.provider == "unsloth"  # the positions: users of the adapter would load a different model
        fix = f'write "max_seq_length": {context}'
        yield Problem("warning", "beyond-context", message, fix, "max_seq_length", stops_training=stretches)


def step_problems(plan: Plan, pairs: int) -> Iterator[Problem]:
    """Problems of options for a step that the training, with this many pairs, never reaches."""
    config = plan.config
    steps = plan.steps_over(pairs)
    if not pairs or not plan.strategy.is_trained:
        return
    if config.eval_steps is not None and config.eval_steps > steps:
        message = f"eval_steps is {config.eval_steps}, but the training has {steps} steps: it is only evaluated at its end"
        yield Problem("warning", "never-evaluated", message, f'write "eval_steps": {max(1, steps // 4)}', "eval_steps")
    if plan.warmup_over(steps) >= steps:
        key = "warmup_steps" if config.warmup_steps else "warmup_ratio"
        value, fix = getattr(config, key), 'write "warmup_ratio": 0.1 instead'
        message = f"{key} is {value:g}, but the training has {steps} steps, so it never reaches its learning rate"
        if steps == 1:  # a warm-up starts at 0
            message = f"{key} is {value:g}, but the training has one step: its learning rate is 0, so nothing is trained"
            fix = f'write "{key}": 0, or train more steps'
        # transformers 5.17 divides the polynomial's decay by the number of steps after the warm-up.
        fails = config.lr_scheduler_type == "polynomial" and plan.warmup_over(steps) == steps
        yield Problem("error" if fails else "warning", "never-warm", message, fix, key)
