"""The plan: every value of a run, where each came from, what was counted, and the memory bill. No torch.

`plan.json` is written before the model is loaded, and `dpo train plan.json` repeats the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.config.config import Config, Loaded, Source
from dpo_cli.data import reader
from dpo_cli.data.reader import Dataset
from dpo_cli.errors import DoesNotFit, InvalidInput, Problem
from dpo_cli.hardware import models
from dpo_cli.hardware.memory import Bill, Settings, fit
from dpo_cli.hardware.probe import Machine

PLAN_VERSION = 1


@dataclass(frozen=True)
class Counts:
    """Pairs and tokens of a run, as measured with the model's own tokenizer."""

    train_pairs: int
    eval_pairs: int
    train_prompts: int
    eval_prompts: int
    too_long: int  # pairs left out because they exceed max_seq_length
    longest: int  # tokens of the longest sequence kept
    train_tokens: int  # of all sequences of one epoch, prompts counted once per response


@dataclass(frozen=True)
class Plan:
    """A resolved run. `config` has no open choice left: device, precision, checkpointing and batch are decided."""

    config: Config
    sources: dict[str, Source]
    counts: Counts | None
    memory: Bill | None
    notes: tuple[str, ...]

    @property
    def run_dir(self) -> Path:
        assert self.config.output_dir is not None  # resolve() sets it
        return Path(self.config.output_dir)

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
            "notes": list(self.notes),
        }


# What the machine, not the user or a default, decides.
_MEASURED = frozenset({"device", "bf16", "fp16", "gradient_checkpointing"}) | {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
}


def resolve(loaded: Loaded, machine: Machine, counts: Counts | None = None, vram_gb: float | None = None) -> Plan:
    """Decide every open value of a valid config; `vram_gb` plans for another machine's GPU than this one's."""
    config = loaded.require()
    decided = _decided(config, loaded.file, machine, on_gpu=vram_gb is not None)
    memory: Bill | None = None
    notes: list[str] = []
    facts = models.model_facts(config.model_name)
    if facts is None:
        notes.append("the shape of this model is not known here, so there is no memory bill")
        if config.gradient_checkpointing == "auto":
            decided["gradient_checkpointing"] = decided["device"] == "cuda"
    else:
        wanted = Settings(
            batch=config.per_device_train_batch_size,
            length=min(config.max_seq_length, counts.longest) if counts else config.max_seq_length,
            rank=config.lora_r,
            four_bit=config.use_4bit,
            bytes_per_value=2 if decided["bf16"] or decided["fp16"] else 4,
            checkpointing=False,
            on_gpu=decided["device"] == "cuda",
        )
        free_gb = machine.gpus[0].free_gb if decided["device"] == "cuda" and machine.gpus else machine.memory_gb
        settings, memory = fit(facts, wanted, vram_gb or free_gb, config.gradient_checkpointing)
        factor = wanted.batch // settings.batch
        decided["gradient_checkpointing"] = settings.checkpointing
        decided["per_device_train_batch_size"] = settings.batch
        decided["gradient_accumulation_steps"] = config.gradient_accumulation_steps * factor
        if factor > 1:
            notes.append(f"micro-batches of {settings.batch} instead of {wanted.batch} fit the memory; the steps are the same")
    changed = {key for key, value in decided.items() if getattr(config, key) != value}
    sources: dict[str, Source] = {**loaded.sources}
    sources |= {key: "measured" if key in _MEASURED else sources[key] for key in changed}
    return Plan(replace(config, **decided), sources, counts, memory, tuple(notes))


@dataclass(frozen=True)
class Inspection:
    """All that can be said of a config before torch is imported: every problem, the data, and the plan when there is one."""

    problems: tuple[Problem, ...]
    data: Dataset | None
    plan: Plan | None

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.severity == "error")

    def require(self) -> tuple[Dataset, Plan]:
        """The data and the plan, or the error of what stands in the way."""
        if self.data is not None and self.plan is not None and not self.errors:
            return self.data, self.plan
        only_fit = all(problem.code == DOES_NOT_FIT for problem in self.errors)
        raise (DoesNotFit if only_fit else InvalidInput)(self.problems)


def inspect(loaded: Loaded, machine: Machine, vram_gb: float | None = None, with_data: bool = True) -> Inspection:
    """Check config, data, model and memory together, so that one look shows everything that is wrong."""
    found = list(loaded.problems)
    model, dataset = loaded.values.get("model_name"), loaded.values.get("dataset")
    damaged = list(models.problems(model)) if isinstance(model, str) else []
    found += [loaded.placed(problem) for problem in damaged]
    data = None
    if with_data and isinstance(dataset, str) and dataset:
        data = reader.read(dataset, skip=loaded.values.get("on_bad_rows") == "skip")
        found += [problem if problem.file else loaded.placed(problem) for problem in data.problems]
    plan = None
    if loaded.config is not None and not damaged:
        plan = resolve(loaded, machine, vram_gb=vram_gb)
        if (misfit := does_not_fit(plan)) is not None:
            found.append(replace(misfit, file=loaded.file))
    return Inspection(tuple(found), data, plan)


DOES_NOT_FIT = "does-not-fit"


def does_not_fit(plan: Plan) -> Problem | None:
    """The problem of a plan whose bill is over its budget."""
    if plan.memory is None or plan.memory.fits is not False:
        return None
    message = f"this run needs {plan.memory.total_gb:.1f} GB; there are {plan.memory.budget_gb:.1f}"
    return Problem("error", DOES_NOT_FIT, message, plan.memory.largest_change)


def _decided(config: Config, file: str, machine: Machine, on_gpu: bool) -> dict[str, Any]:
    """The values of open choices. Paths become absolute, so that plan.json works from any folder."""
    device = "cuda" if on_gpu else machine.device if config.device == "auto" else config.device
    bf16, fp16 = config.bf16, config.fp16
    if bf16 is None and fp16 is None:
        has_bf16 = {"cuda": all(gpu.has_bf16 for gpu in machine.gpus), "cpu": machine.has_amx}.get(device, False)
        bf16, fp16 = has_bf16, device == "cuda" and not has_bf16
    name = Path(file).stem if file != "-" else "stdin"
    return {
        "device": device,
        "bf16": bool(bf16),
        "fp16": bool(fp16),
        "lora_alpha": config.lora_alpha or 2 * config.lora_r,
        "output_dir": str(Path(config.output_dir or Path("runs") / name).absolute()),
        "dataset": str(Path(config.dataset).absolute()),
        "model_name": str(Path(config.model_name).absolute()) if Path(config.model_name).exists() else config.model_name,
    }
