"""The plan: every value of a run, where each came from, what was counted, and the memory bill. No torch.

`plan.json` is written before the model is loaded, and once more when the model has decided how prompts are scored;
`dpo train plan.json` repeats the run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.config.config import PLAN_VERSION, Config, Loaded, Source
from dpo_cli.data import reader
from dpo_cli.data.reader import Dataset
from dpo_cli.data.split import split
from dpo_cli.errors import DoesNotFit, InvalidInput, Problem
from dpo_cli.hardware import models
from dpo_cli.hardware.memory import Bill, Settings, fit
from dpo_cli.hardware.probe import Machine


@dataclass(frozen=True)
class Counts:
    """Pairs and tokens of a run, as measured with the model's own tokenizer."""

    train_pairs: int
    eval_pairs: int
    train_prompts: int
    eval_prompts: int
    too_long: int  # pairs left out because they exceed max_seq_length
    longest: int  # tokens of the longest sequence kept
    longest_pair: int  # tokens of the longest pair kept, its prompt counted once
    train_tokens: int  # of all sequences of one epoch, prompts counted once per response
    shared_tokens: int  # the same with each pair's prompt counted once


@dataclass(frozen=True)
class Scoring:
    """Whether each prompt goes through the model once for both responses, and why."""

    shared: bool
    why: str


# What `prompt_sharing` says before a model is loaded.
EXPECTED: dict[bool | str, Scoring] = {
    "auto": Scoring(True, "each prompt once, where this model allows it"),
    True: Scoring(True, "each prompt once"),
    False: Scoring(False, 'each prompt twice: "prompt_sharing" is false'),
}


@dataclass(frozen=True)
class Plan:
    """A resolved run: device, precision, checkpointing and batch are decided.

    How prompts are scored is settled with the loaded model; until then `scoring` says what is expected.
    """

    config: Config
    sources: dict[str, Source]
    counts: Counts | None
    memory: Bill | None
    scoring: Scoring
    notes: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        assert self.config.output_dir is not None  # resolve() sets it
        return Path(self.config.output_dir)

    @property
    def model_label(self) -> str:
        """The model's name without the folder of a local one."""
        return Path(self.config.model_name).name if Path(self.config.model_name).is_absolute() else self.config.model_name

    @property
    def dtype(self) -> str:
        """The compute dtype by torch's name."""
        return "bfloat16" if self.config.bf16 else "float16" if self.config.fp16 else "float32"

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run, as Trainer counts them: a last incomplete group of micro-batches is a step too."""
        assert self.counts is not None
        if self.config.max_steps is not None:
            return self.config.max_steps
        batches = math.ceil(self.counts.train_pairs / self.config.per_device_train_batch_size)
        return math.ceil(self.config.num_train_epochs * math.ceil(batches / self.config.gradient_accumulation_steps))

    def to_json(self) -> dict[str, Any]:
        return {
            "plan_version": PLAN_VERSION,
            "config": self.config.to_json(),
            "sources": self.sources,
            "counts": vars(self.counts) if self.counts else None,
            "memory": self.memory.to_json() if self.memory else None,
            "scoring": vars(self.scoring),
            "notes": list(self.notes),
        }


# What the machine, not the user or a default, decides.
MEASURED = frozenset({"device", "bf16", "fp16", "gradient_checkpointing"}) | {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


def resolve(
    loaded: Loaded,
    machine: Machine,
    counts: Counts | None = None,
    scoring: Scoring | None = None,
    vram_gb: float | None = None,
) -> Plan:
    """Decide every open value of a valid config; `vram_gb` plans for another machine's GPU than this one's.

    `scoring` is what the loaded model decided; before that, prompts are taken to be shared unless the config says no.
    """
    config = loaded.require()
    decided = _decided(config, loaded.file, machine, on_gpu=vram_gb is not None)
    memory: Bill | None = None
    notes: list[str] = []
    scoring = scoring or EXPECTED[config.prompt_sharing]
    facts = models.model_facts(config.model_name)
    if facts is None:
        notes.append("the shape of this model is not known here, so there is no memory bill")
        if config.gradient_checkpointing == "auto":
            decided["gradient_checkpointing"] = decided["device"] == "cuda"
    else:
        wanted = Settings(
            batch=config.per_device_train_batch_size,
            length=counts.longest if counts else config.max_seq_length,
            pair_tokens=counts.longest_pair if counts and scoring.shared else None,
            rank=config.lora_r,
            four_bit=config.use_4bit,
            bytes_per_value=2 if decided["bf16"] or decided["fp16"] else 4,
            checkpointing=False,
            on_gpu=decided["device"] == "cuda",
        )
        if decided["device"] == "cuda":
            budget_gb = vram_gb or (machine.gpus[0].free_gb if machine.gpus else None)
        else:
            budget_gb = machine.memory_gb
        settings, memory = fit(facts, wanted, budget_gb, config.gradient_checkpointing)
        factor = wanted.batch // settings.batch
        decided["gradient_checkpointing"] = settings.checkpointing
        decided["per_device_train_batch_size"] = settings.batch
        decided["gradient_accumulation_steps"] = config.gradient_accumulation_steps * factor
        if factor > 1:
            notes.append(f"micro-batches of {settings.batch} instead of {wanted.batch} fit the memory; the steps are the same")
    changed = {key for key, value in decided.items() if getattr(config, key) != value}
    sources: dict[str, Source] = {**loaded.sources}
    sources |= dict.fromkeys(changed & MEASURED, "measured")
    return Plan(replace(config, **decided), sources, counts, memory, scoring, tuple(notes))


DOES_NOT_FIT = "does-not-fit"


@dataclass(frozen=True)
class Inspection:
    """All that can be said of a config before torch is imported: every problem, the data, and the plan when there is one."""

    problems: tuple[Problem, ...]
    data: Dataset | None
    plan: Plan | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def only_misfit(self) -> bool:
        """Whether the hardware is all that is wrong."""
        return all(problem.code == DOES_NOT_FIT for problem in self.errors)

    def require(self) -> tuple[Dataset, Plan]:
        """The data and the plan, or the error of what stands in the way."""
        if self.data is not None and self.plan is not None and not self.errors:
            return self.data, self.plan
        raise (DoesNotFit if self.only_misfit else InvalidInput)(self.problems)


def inspect(
    loaded: Loaded, machine: Machine, vram_gb: float | None = None, with_data: bool = True, with_fit: bool = True
) -> Inspection:
    """Check config, data, model and hardware together, so that one look shows everything that is wrong.

    Without `with_fit` the memory is not judged: a training judges it later, by its real lengths.
    """
    found = list(loaded.problems)
    model, dataset = loaded.values.get("model_name"), loaded.values.get("dataset")
    damaged = list(models.problems(model)) if isinstance(model, str) else []
    found += map(loaded.placed, damaged)
    data = None
    if with_data and isinstance(dataset, str) and dataset:
        data = reader.read(dataset, skip=loaded.values.get("on_bad_rows") == "skip")
        found += [problem if problem.file else loaded.placed(problem) for problem in data.problems]
        found += map(loaded.placed, _split_problems(data, loaded))
    plan = None
    if loaded.config is not None and not damaged:
        plan = resolve(loaded, machine, vram_gb=vram_gb)
        found += map(loaded.placed, hardware_problems(plan, machine, for_this_machine=vram_gb is None))
        if with_fit and (misfit := does_not_fit(plan)) is not None:
            found.append(loaded.placed(misfit))
    return Inspection(tuple(found), data, plan)


def _split_problems(data: Dataset, loaded: Loaded) -> Iterator[Problem]:
    config = loaded.config
    if config is None or not data.pairs or not config.eval_split:
        return
    train, held_out = split(data.pairs, config.eval_split, config.seed)
    if not train:
        fix = "lower eval_split, or add pairs with other prompts"
        yield Problem("error", "nothing-to-train", f"all {len(held_out)} pairs are held out", fix, "eval_split")
    if not held_out:
        fix = "raise eval_split, or add pairs with other prompts"
        yield Problem("warning", "nothing-held-out", "no prompt falls into the held-out share", fix, "eval_split")


def hardware_problems(plan: Plan, machine: Machine, for_this_machine: bool) -> Iterator[Problem]:
    """What the plan asks of the hardware and the hardware does not have."""
    config = plan.config
    if config.fp16 and config.device != "cuda":
        yield Problem("error", "fp16-device", "fp16 training needs CUDA", "use bf16, or leave both keys out", "fp16")
    if not for_this_machine:
        return
    if (config.device == "cuda" and not machine.gpus) or (config.device == "mps" and not machine.is_apple):
        message = f'there is no "{config.device}" device on this machine'
        yield Problem("error", "device-missing", message, 'leave "device" out, or plan with --vram', "device")
    if config.bf16 and config.device == "cuda" and not all(gpu.has_bf16 for gpu in machine.gpus):
        yield Problem("error", "bf16-device", "this GPU has no bfloat16", 'leave "bf16" out: fp16 is used', "bf16")


def does_not_fit(plan: Plan) -> Problem | None:
    """The problem of a plan whose bill is over its budget."""
    if plan.memory is None or plan.memory.fits is not False:
        return None
    message = f"this run needs {plan.memory.total_gb:.1f} GB; there are {plan.memory.budget_gb:.1f}"
    return Problem("error", DOES_NOT_FIT, message, plan.memory.largest_change)


def _decided(config: Config, file: str, machine: Machine, on_gpu: bool) -> dict[str, Any]:
    """The values of open choices. Paths become absolute, so that plan.json works from any folder."""
    device = "cuda" if on_gpu else machine.device if config.device == "auto" else config.device
    has_bf16 = {"cuda": all(gpu.has_bf16 for gpu in machine.gpus), "cpu": machine.has_amx}.get(device, False)
    bf16 = config.bf16 if config.bf16 is not None else has_bf16 and not config.fp16
    fp16 = config.fp16 if config.fp16 is not None else device == "cuda" and not bf16
    name = Path(file).stem if file != "-" else "stdin"
    return {
        "device": device,
        "bf16": bf16,
        "fp16": fp16,
        "lora_alpha": config.lora_alpha or 2 * config.lora_r,
        "output_dir": str(Path(config.output_dir or Path("runs") / name).absolute()),
        "dataset": str(Path(config.dataset).absolute()),
        "model_name": str(Path(config.model_name).absolute()) if os.path.exists(config.model_name) else config.model_name,
    }
