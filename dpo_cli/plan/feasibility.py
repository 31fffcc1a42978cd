"""Requirements of a plan that the machine does not meet, and what the user can change. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from dpo_cli.config.options import Config
from dpo_cli.config.rules import compares_pairs
from dpo_cli.errors import Problem
from dpo_cli.hardware import unsloth_support
from dpo_cli.hardware.fit import savings
from dpo_cli.hardware.machine import GIB, Machine
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.hardware.recommend import profiles
from dpo_cli.plan.decisions import NOT_ON_MPS, longest_of
from dpo_cli.plan.plan import Plan
from dpo_cli.results.compared import compared
from dpo_cli.storage.atomic import free_bytes
from dpo_cli.storage.checkpoints import KEPT
from dpo_cli.storage.run_directory import RunDirectory

BITSANDBYTES_FIX = "install it: pip install bitsandbytes (a requirement of this program)"
DOES_NOT_FIT, NO_ROOM = "does-not-fit", "disk-too-full"
BESIDE_BYTES = 16 << 20  # for tokenizer, log, report and the like
HOST_GB = 16  # dpo-strategy, "Minimum Requirements"


def hardware_problems(plan: Plan, machine: Machine, vram_gb: float | None) -> Iterator[Problem]:
    """Requirements of the plan that the hardware does not meet; with `vram_gb` the plan is for another machine.

    They are warnings, because a config may be checked on one machine and used on another; a training here is stopped.
    """
    config = plan.config
    if config.fp16 and config.device != "cuda":
        message, fix = f"fp16 needs CUDA, but this run uses {config.device}", 'write "bf16": true instead, or remove "fp16"'
        yield Problem("warning", "fp16-device", message, fix, "fp16", stops_training=True)
    if config.device == "mps" and config.optim in NOT_ON_MPS:
        message, fix = f"optim {config.optim} is not supported on mps", 'remove "optim", or write "device": "cpu"'
        yield Problem("warning", "optim-device", message, fix, "optim", stops_training=True)
    cpu_is_said = config.device == "cpu" and plan.sources.get("device") != "measured"
    yield from unsloth_support.problems(config, cpu_is_said, machine, for_another=vram_gb is not None)
    if (config.use_4bit or config.use_8bit) and find_spec("bitsandbytes") is None:
        key = "use_4bit" if config.use_4bit else "use_8bit"
        message = f"{key} needs the package bitsandbytes, which is not installed"
        yield Problem("warning", "bitsandbytes-missing", message, BITSANDBYTES_FIX, key, stops_training=True)
    if vram_gb is not None and plan.memory is None:
        message = f"the shape of {plan.model_label} is unknown, so nothing says whether the run fits {vram_gb:g} GB"
        fix = "fetch the model first (hf download NAME), or name its folder"
        yield Problem("warning", "memory-unknown", message, fix, "model_name")
    card_gb = vram_gb or min((gpu.memory_gb for gpu in machine.gpus), default=None)
    documented_gb = profiles()[smallest]["from_gb"] if (smallest := plan.strategy.documented_profile) else 0.0
    # A card reports a little less than its nominal memory.
    if card_gb is not None and card_gb < documented_gb - 0.5 and not config.use_4bit:
        message = f"the card has {card_gb:g} GB, less than the {documented_gb} GB documented for {plan.strategy.name.upper()}"
        fix = f'write "use_4bit": true (QLoRA), or use a smaller model: `dpo recommend --vram {card_gb:g}`'
        yield Problem("hint", "small-card", message, fix, "use_4bit")
    host_gb = HOST_GB if vram_gb is not None else machine.memory_gb
    here = machine.processes or plan.processes
    if plan.memory is not None and config.device == "cuda" and here * plan.memory.host_gb > host_gb:
        needed, present = compared(here * plan.memory.host_gb, host_gb, digits=0)
        who = f"{here} processes on one machine need" if here > 1 else "loading this model needs"
        has = f"{present} GB are assumed, the documented least" if vram_gb is not None else f"it has {present} GB"
        message = f"{who} {needed} GB of the machine's memory, but {has}"
        fix = "name the safetensors model instead of a GGUF file, or a smaller model"
        if plan.is_divided:
            fewer = "start fewer processes on a machine, " if here > 1 else ""
            fix = f"{fewer}{'' if config.use_4bit else 'quantise to 4 bits, '}or use a smaller model or a machine with more RAM"
        yield Problem("warning", "host-memory", message, fix, "model_name")
    if vram_gb is not None:
        return
    yield from _tracker_problems(config)
    if machine.memory_gb < HOST_GB - 1:  # the firmware reserves a part
        message = f"this machine has {machine.memory_gb:g} GB of memory; the documentation recommends at least {HOST_GB} GB"
        yield Problem("hint", "small-memory", message, "loading a model may fail: close other programs, or use a smaller model")
    if (config.device == "cuda" and not machine.gpus) or (config.device == "mps" and not machine.is_apple):
        message = f'this machine has no "{config.device}" device'
        fix = 'remove "device", or plan for another machine with --vram'
        yield Problem("warning", "device-missing", message, fix, "device", stops_training=True)
    if config.bf16 and config.device == "cuda" and not machine.has_bf16:
        fix = 'remove "bf16": fp16 is used'
        yield Problem("warning", "bf16-device", "this GPU does not support bfloat16", fix, "bf16", stops_training=True)


def does_not_fit(plan: Plan) -> Problem | None:
    """The problem of a plan that needs more memory than its budget."""
    if plan.memory is None or plan.memory.budget_gb is None or plan.memory.fits:
        return None
    needed, budget = compared(plan.memory.total_gb, plan.memory.budget_gb)
    message = f"this run needs {needed} GB of memory, but there are {budget} GB"
    return Problem("error", DOES_NOT_FIT, message, plan.memory.largest_change)


def disk_problem(plan: Plan) -> Problem | None:
    """The problem of a run whose files do not fit on the disk of its output_dir.

    The disk needs space for the kept checkpoints, which may exist already, the next checkpoint, and the new adapter next to the
    old one. A checkpoint holds the trained weights, as large as their gradients, and the optimizer's state.
    """
    if plan.memory is None:
        return None
    trained, optimizer = (plan.memory.components[name] for name in ("gradients", "optimizer"))
    best = trained if plan.config.early_stopping_patience else 0.0
    needed = (KEPT + 1) * (trained + optimizer + best) + 2 * trained + BESIDE_BYTES
    free = free_bytes(plan.run_dir) + RunDirectory(plan.run_dir).held_bytes()
    if free >= needed:
        return None
    needed_gb, free_gb = compared(needed / GIB, free / GIB, digits=2)
    message = f"checkpoints and adapter need {needed_gb} GB on the disk of {plan.run_dir}, but {free_gb} GB are free"
    return Problem("error", NO_ROOM, message, "free space on that disk, or name an output_dir on another one", "output_dir")


def out_of_memory(plan: Plan) -> Problem:
    """The problem of a training whose longest pair alone did not fit, or whose longest micro-batch did not, with a loss that
    compares its pairs, so that it cannot be split."""
    assert plan.counts is not None
    batch = plan.config.per_device_train_batch_size
    is_whole = batch > 1 and compares_pairs(plan.config)
    pair = f"the longest pair ({plan.counts.longest} tokens, {plan.counts.longest_at})"
    message = f"{pair}, with the {batch - 1} others that the loss compares, does not fit the memory"
    message = message if is_whole else f"{pair} alone does not fit the memory"
    return Problem("error", DOES_NOT_FIT, message, remedies(plan) or "reduce max_seq_length, or use a smaller model")


def remedies(plan: Plan) -> str | None:
    """The changes that the user can make, each with its saving, if the estimate itself is within the budget."""
    facts = plan.model.facts
    if facts is None:
        return None
    settings = Settings.of(plan.config, facts, longest_of(plan.counts, plan.scoring))
    return "; ".join(savings(facts, settings)) or None


LOGIN_FIX = 'log in with `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline; or write "report_to": "none"'


def _tracker_problems(config: Config) -> Iterator[Problem]:
    """Requirements of the trackers of a config that this machine lacks."""
    names = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in names:
        if name == "none":
            continue
        if not _installed(name):
            message = f"report_to needs the package {name}, which is not installed"
            fix = f'install it: pip install {name}; or write "report_to": "none"'
            yield Problem("warning", "tracker-missing", message, fix, "report_to", stops_training=True)
        elif name == "wandb" and (lack := _wandb_lacks()):
            yield Problem("warning", "wandb-login", lack, LOGIN_FIX, "report_to", stops_training=True)


def _installed(package: str) -> bool:
    """Whether a package is installed. A folder of that name is not enough: wandb creates one where it runs."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def _wandb_lacks() -> str | None:
    """The problem of wandb's credentials, by wandb itself; without them it asks on the terminal, or fails."""
    import wandb

    if wandb.setup().settings.mode in ("offline", "disabled"):
        return None
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return f"wandb cannot log in: {error}"
    return None if has_key else "wandb has no API key on this machine"
