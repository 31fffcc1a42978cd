"""The decisions of a plan: what the config, the machine and the memory leave open is decided here. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from dpo_cli.config.config import Loaded, Source
from dpo_cli.config.division_rules import obstacle_to_division, weights_can_be_divided
from dpo_cli.config.options import Config
from dpo_cli.config.rounds import notes_of
from dpo_cli.data.hub_datasets import is_hub_id
from dpo_cli.errors import InvalidInput
from dpo_cli.hardware.fit import fit, way
from dpo_cli.hardware.machine import Machine
from dpo_cli.hardware.memory import Bill
from dpo_cli.hardware.memory_inputs import Longest, Settings
from dpo_cli.hardware.reward_model import with_reward_model
from dpo_cli.models.quantised_files import OPTIONS
from dpo_cli.models.shape import ModelFacts
from dpo_cli.models.source import ModelSource
from dpo_cli.plan.adapter_start import started
from dpo_cli.plan.plan import MEASURED, Counts, Plan, Scoring, expected_scoring
from dpo_cli.results.compared import compared
from dpo_cli.storage.world import AUTO
from dpo_cli.strategies.strategies import STRATEGIES

NOT_ON_MPS = ("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")  # optimizers of bitsandbytes, without a Metal kernel


def resolve(
    loaded: Loaded,
    machine: Machine,
    counts: Counts | None = None,
    scoring: Scoring | None = None,
    vram_gb: float | None = None,
    longest: int | None = None,
    is_resumed: bool = False,
    row_tokens: int | None = None,
    model: ModelSource | None = None,
    fsdp: bool | None = None,
) -> Plan:
    """Decide every open value of a valid config; `vram_gb` plans for the GPU of another machine.

    `longest` is the estimated length of the longest sequence without `counts`, if less than max_seq_length. `scoring` is the
    way that the loaded model decided; without it prompts are shared unless the config says no. With `is_resumed` the config
    has the values of a started run, and `row_tokens` are its own: the free memory decides nothing, and the total memory of the
    device is the budget.
    `model` is the model of model_name, if that is already resolved. `fsdp` is whether its weights are divided, if that is
    decided.
    """
    config = loaded.require()
    model = model or ModelSource.of(config.model_name)
    start, notes = started(loaded, config, model)
    now = _decided(config.replaced(start), loaded.file, machine, on_gpu=vram_gb is not None)
    if now.device == "cpu" and leaves_precision_open(config):
        notes.append(machine.cpu_words)
    is_merged = model.adapter is not None and start["reference"] == "base"  # then the weights are not quantised
    if (stored := model.files.quantisation) is not None and not is_merged and stored.bits in OPTIONS:
        now = now.replaced({OPTIONS[stored.bits]: True})
        notes.append(f"the files of the model hold {stored.bits}-bit weights, which are used as they are")
    now, placed = _placed(now, loaded)
    notes += placed
    scoring = scoring or expected_scoring(config)
    memory: Bill | None = None
    filled = 0
    if model.facts is None:
        notes.append("the shape of this model is unknown, so its memory cannot be estimated")
        if config.gradient_checkpointing == "auto":
            now = replace(now, gradient_checkpointing=now.device == "cuda")
        now = replace(now, fsdp=now.fsdp is True)
    else:
        longest_rows = longest_of(counts, scoring, longest)
        wanted = with_reward_model(Settings.of(now, model.facts, longest_rows), now, model.facts)
        if row_tokens is not None:
            wanted = replace(wanted, row_tokens=row_tokens)
        has_gb, free_gb = machine.memory_of(now.device, int(now.num_processes))
        budget_gb = vram_gb or (has_gb if is_resumed else free_gb)
        now, wanted, divided = _divided(now, model.facts, wanted, budget_gb, fsdp)
        unsplit = replace(wanted, is_whole=True) if is_resumed else wanted  # a resumed run keeps its rows and micro-batches
        settings, memory = fit(model.facts, unsplit, budget_gb, config.gradient_checkpointing)
        filled = settings.row_tokens if row_tokens is None else row_tokens
        now = _fitted(now, wanted, settings)
        notes += [*divided, *_notes_of_memory(now, wanted, settings, memory, free_gb if is_resumed else None)]
    sources: dict[str, Source] = {**loaded.sources}
    sources |= dict.fromkeys((key for key in MEASURED if getattr(config, key) != getattr(now, key)), "measured")
    day = loaded.day or datetime.now().date()
    plan = Plan(now, model.absolute(), sources, counts, memory, scoring, (*notes_of(loaded), *notes), day, filled)
    return plan.with_affordable_evaluation() if sources["kl_prompts"] == "default" else plan


def _placed(config: Config, loaded: Loaded) -> tuple[Config, list[str]]:
    """The config with the places of weights and activations that its device has, and notes.

    `InvalidInput` for weights that cannot be divided, which only the files of the model show.
    """
    notes, names = list[str](), [name for name in ("fsdp", "cpu_offload") if getattr(config, name) is True]
    if config.device == "mps" and names:
        notes.append(f"{' and '.join(names)} do nothing on Apple's GPUs, which share the RAM")
        config = replace(config, fsdp=False, cpu_offload=False)
    if problems := list(weights_can_be_divided(config.to_json(), loaded.values)):
        raise InvalidInput([loaded.placed(problem) for problem in problems])
    if config.cpu_offload and config.num_processes != 1:
        config = replace(config, fsdp=True)
    if config.cpu_offload and config.device == "cpu":
        notes.append("cpu_offload only adds copies on a CPU, where weights are in the RAM")
    if config.activation_offloading and config.device != "cuda":
        notes.append("activation_offloading does nothing without an NVIDIA GPU")
    if config.fsdp is True and config.num_processes == 1 and loaded.sources["fsdp"] in ("config", "override"):
        notes.append("fsdp divides weights over several processes, and this is one; cpu_offload keeps them in the RAM")
    return config, notes


def _divided(
    config: Config, facts: ModelFacts, wanted: Settings, budget_gb: float | None, fsdp: bool | None
) -> tuple[Config, Settings, list[str]]:
    """Config and settings with the decision whether processes divide the weights, and a note; `fsdp` is one that was made.

    They do where no card holds all.
    """
    if config.fsdp != "auto":
        return config, wanted, []
    is_needed = fsdp
    if is_needed is None:
        may = config.num_processes != 1 and obstacle_to_division(config.to_json()) is None
        is_needed = may and way(facts, wanted, budget_gb, config.gradient_checkpointing)[1].fits is False
    config = replace(config, fsdp=is_needed)
    if not is_needed:
        return config, wanted, []
    note = f"fsdp: no {config.device} device holds the whole model, so {config.num_processes} processes divide it"
    return config, replace(wanted, shards=int(config.num_processes)), [note]


def _fitted(config: Config, wanted: Settings, settings: Settings) -> Config:
    """The config with the micro-batches and the checkpointing that fit, and the pairs of a step as they were."""
    return replace(
        config,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=config.gradient_accumulation_steps * (wanted.batch // settings.batch),
        gradient_checkpointing=settings.checkpointing,
    )


def _notes_of_memory(
    config: Config, wanted: Settings, settings: Settings, memory: Bill, free_gb: float | None
) -> Iterator[str]:
    """What is not billed, what a resumed run lacks (`free_gb`), and what the memory changes, or cannot, of micro-batches."""
    if config.reward_model is not None and not wanted.reward_bytes and STRATEGIES[config.strategy].generates:
        yield "the shape of the reward model is unknown, so its memory is not in the bill"
    if memory.fits and free_gb is not None and memory.total_gb > free_gb:
        needed, free = compared(memory.total_gb, free_gb)
        lack = f"the run needs {needed} GB, but {free} GB are free now"
        yield f"{lack}: close other programs that use the {config.device} device, or it may run out of memory"
    if settings.batch < wanted.batch and memory.fits is not False:
        yield f"micro-batches of {settings.batch} instead of {wanted.batch} fit the memory; the optimizer steps are the same"
    elif wanted.is_whole and wanted.batch > 1 and memory.fits is False:
        yield f"micro-batches stay at {wanted.batch}: the loss compares the pairs of one, so it cannot be split"


def longest_of(counts: Counts | None, scoring: Scoring, expected: int | None = None) -> Longest:
    """The lengths that decide a run's memory; `expected` is the length of the longest sequence without counts."""
    if counts is None:
        return Longest(expected)
    pair = counts.longest_pair if scoring.shared else None
    return Longest(counts.longest, pair, counts.longest_responses, counts.longest_prompt)


def device_of(config: Config, machine: Machine) -> Literal["cuda", "mps", "cpu"]:
    """The device of a run on this machine."""
    if config.device != "auto":
        return config.device
    return "cpu" if machine.device == "mps" and config.optim in NOT_ON_MPS else machine.device


def leaves_precision_open(config: Config) -> bool:
    """Whether the machine decides between bfloat16 and another precision."""
    return config.bf16 is None and not config.fp16


def _decided(config: Config, file: str, machine: Machine, on_gpu: bool) -> Config:
    """The config with its open values decided. Paths become absolute, so that plan.json works from any folder."""
    device = "cuda" if on_gpu else device_of(config, machine)
    has_bf16 = {"cuda": machine.has_bf16, "cpu": machine.cpu_has_bf16}.get(device, False)
    bf16 = config.bf16 if config.bf16 is not None else has_bf16 and not config.fp16
    fp16 = config.fp16 if config.fp16 is not None else device == "cuda" and not bf16
    name = Path(file).stem if file != "-" else "stdin"
    return replace(
        config,
        device=device,
        num_processes=max(1, len(machine.gpus)) if config.num_processes == AUTO else config.num_processes,
        bf16=bf16,
        fp16=fp16,
        lora_alpha=config.lora_alpha or 2 * config.lora_r or None,
        output_dir=str(Path(config.output_dir or Path("runs") / name).absolute()),
        dataset=_absolute(config.dataset),
        eval_dataset=_absolute(config.eval_dataset) if config.eval_dataset else None,
        reward_model=_absolute_model(config.reward_model) if config.reward_model else None,
        prompts_file=str(Path(config.prompts_file).absolute()) if config.prompts_file else None,
        model_name=_absolute_model(config.model_name),
    )


def _absolute_model(name: str) -> str:
    """The name of a model; of a local one its absolute path."""
    return str(Path(name).absolute()) if os.path.exists(name) else name


def _absolute(dataset: str | list[object]) -> str | list[object]:
    """The dataset with absolute paths."""
    if isinstance(dataset, str):
        return _absolute_path(dataset)
    return [
        {**entry, "path": _absolute_path(entry["path"])} if isinstance(entry, dict) else _absolute_path(str(entry))
        for entry in dataset
    ]


def _absolute_path(name: str) -> str:
    return name if not name or is_hub_id(name) else str(Path(name).absolute())
