"""Part `bill`: the memory bill against a GPU, by real steps of real shapes with random weights, and cards imitated by a limit.

Nothing is downloaded: a model is built on the device, in 4 and 8 bits too. Measured is torch's own peak of allocated bytes,
which a bill without context and slack predicts. Both of these are fitted to what the device really lacks: context + (1 + slack)
times the allocated bytes, by least squares. On a CPU a tiny shape shows that it runs.

A card of 8 to 24 GB is imitated by a limit of torch's allocator, less the context of this process; on it runs the config that
`dpo recommend --vram` gives, with pairs as long as its max_seq_length.
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baseline import Column
from step_memory import billed, plan_of, random_model, random_rows, step_peak, trainer_for
from transformers import LlamaConfig, PreTrainedModel

from dpo_cli.hardware.fit import way
from dpo_cli.hardware.machine import GIB
from dpo_cli.hardware.memory import components
from dpo_cli.hardware.memory_inputs import Longest, Settings
from dpo_cli.hardware.recommend import Request, recommend
from dpo_cli.models.shape import ModelFacts
from dpo_cli.models.source import ModelSource
from dpo_cli.providers.out_of_memory import free_memory
from dpo_cli.providers.sharding import shard
from dpo_cli.storage.world import ALONE
from gpu.runner import MEASURED, RIGHT, WRONG, CannotRun, Check, Part, Setting

MODELS = {
    "1B": "meta-llama/Llama-3.2-1B-Instruct",
    "3B": "meta-llama/Llama-3.2-3B-Instruct",
    "8B": "meta-llama/Llama-3.1-8B-Instruct",
}
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPE = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SHAPE += ("vocab_size", "tie_word_embeddings")
SHORTER, REHEARSED = 8, 6  # times, of the lengths of a rehearsal; and its rows
CARDS_GB = (8, 12, 16, 24)
RESPONSE_SHARE = 0.25  # of a sequence
WORST = 0.1  # of what is measured
SMALL_GB = 2**-10  # what a library takes by itself: nothing, next to a real model
OF_A_STEP = ("activations", "scoring", "gathered")  # components that come and go
BASE = Settings(batch=2, length=1024, rank=16, bytes_per_value=2, checkpointing=True)
# One thing changed at a time, then the corners; the flag says whether prompts go through once.
GRID: tuple[tuple[Settings, bool], ...] = (
    (replace(BASE, batch=1), True),
    (BASE, True),
    (replace(BASE, checkpointing=False, batch=1), True),
    (replace(BASE, length=4096, batch=1), True),
    (replace(BASE, rank=64), True),
    (replace(BASE, strategy="sft"), False),
    (BASE, False),
    (replace(BASE, length=2048), True),
    (replace(BASE, batch=8), True),
    (replace(BASE, length=8192, batch=1), True),
    (replace(BASE, length=512), True),
    (replace(BASE, checkpointing=False, length=512), True),
    (replace(BASE, strategy="sft", checkpointing=False), False),
    (replace(BASE, length=4096, batch=4, rank=64), True),
)


def facts_of(setting: Setting, model: str) -> ModelFacts:
    """The shape of a known model; in the rehearsal a tiny one in its place."""
    facts = ModelSource.of(model).facts
    assert facts is not None
    return replace(facts, **TINY) if setting.is_small else facts


def config_of(facts: ModelFacts) -> LlamaConfig:
    """A Llama of this shape, for models of other families too."""
    return LlamaConfig(**{name: getattr(facts, name) for name in SHAPE})


def model_of(facts: ModelFacts, settings: Settings, device: str) -> PreTrainedModel:
    """Random weights of this shape; `CannotRun` where bitsandbytes has no kernels for this machine."""
    try:
        return random_model(config_of(facts), settings, device)
    except (ImportError, NotImplementedError) as error:
        raise CannotRun((str(error) or type(error).__name__).splitlines()[0]) from error


def rows(setting: Setting, name: str, bits: int | None, in_ram: bool = False) -> None:
    """The rows of a model in a precision, over the grid, until the time of the check is over."""
    logging.disable(logging.WARNING)
    facts = facts_of(setting, MODELS[name])
    model, longest = model_of(facts, replace(BASE, bits=bits), setting.device), 0.0
    if in_ram:
        shard(model.to("cpu"), torch.device(setting.device), ALONE, in_ram=True)
        free_memory()
    for settings, shared in GRID[:REHEARSED] if setting.is_small else GRID:
        if setting.seconds_left < 2 * longest + 1:
            return
        began = time.monotonic()
        smaller = replace(settings, length=settings.length // SHORTER) if setting.is_small else settings
        case = _case(smaller, shared)
        try:
            figures = measure(model, facts, replace(smaller, bits=bits, in_ram=in_ram), shared, setting.device)
        except torch.OutOfMemoryError as error:
            setting.not_run(case, str(error).splitlines()[0])
        else:
            setting.agrees(case, figures, {"error": WORST})
        longest = max(longest, time.monotonic() - began)


def _case(settings: Settings, shared: bool) -> str:
    words = [settings.strategy, f"batch {settings.batch}", f"{settings.length} tokens", f"rank {settings.rank}"]
    words += ["checkpointing"] * settings.checkpointing
    words += ["prompts twice"] * (settings.strategy == "dpo" and not shared)
    return ", ".join(words)


def measure(model: PreTrainedModel, facts: ModelFacts, settings: Settings, shared: bool, device: str) -> dict[str, Any]:
    """The bill of the settings and what torch allocated at its most, in GB."""
    response = max(2, int(RESPONSE_SHARE * settings.length))
    prompt = settings.length - response
    model.gradient_checkpointing_disable()
    trainer = None
    try:
        with tempfile.TemporaryDirectory() as place:
            plan = plan_of(settings, settings.length, shared, device, Path(place))
            known = billed(plan, facts, prompt, response)
            every = components(facts, known).items()
            parts = {name: size / GIB for name, size in every if name not in ("cuda_context", "allocator_slack")}
            trainer = trainer_for(model, known, plan, random_rows(facts.vocab_size, known, prompt, response))
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures = {"predicted": sum(parts.values())}
            step = step_peak(trainer, device) / GIB
        if device == "cuda":
            figures["measured"] = torch.cuda.max_memory_allocated() / GIB
            figures["reserved"] = torch.cuda.max_memory_reserved() / GIB
            figures["context"] = context_bytes() / GIB
        else:  # a CPU process has no counter of its own: what comes and goes is measured, the rest taken from the bill
            figures["measured"] = step + sum(size for name, size in parts.items() if name not in OF_A_STEP)
    finally:
        if trainer is not None:
            trainer.model.unload()
        del trainer
        free_memory()
    apart = max(0.0, abs(figures["predicted"] - figures["measured"]) - SMALL_GB)
    return {**figures, "error": apart / figures["measured"]}


def context_bytes() -> int:
    """What this process holds of the GPU outside torch's allocator; it is right where no other process uses the GPU."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def card(setting: Setting, vram: int) -> None:
    """The recommended config on a card with so much memory."""
    logging.disable(logging.WARNING)
    advised = recommend(Request(float(vram), None, None, "dpo"))
    name = str(advised.config["model_name"])
    facts = facts_of(setting, name)
    values = advised.values.replaced({"device": setting.device})
    settings = way(facts, Settings.of(values, facts, Longest()), float(vram), values.gradient_checkpointing)[0]
    settings = replace(settings, length=settings.length // SHORTER if setting.is_small else settings.length)
    response = max(2, int(RESPONSE_SHARE * settings.length))
    notices: list[str] = []
    model = model_of(facts, settings, setting.device)
    plan = plan_of(settings, settings.length, True, setting.device, setting.place)
    case = f"{vram} GB, {name.split('/')[-1]}, {f'{settings.bits}-bit, ' * bool(settings.bits)}{_case(settings, True)}"
    figures: dict[str, Any] = {"predicted": advised.memory.total_gb}
    free_memory()
    if not setting.is_small:
        total = torch.cuda.mem_get_info()[1]
        allowed = vram * GIB - context_bytes()
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
        if (why := _without_limit(int(allowed))) is not None:
            setting.says(case, WRONG, {}, why)
            return
        torch.cuda.reset_peak_memory_stats()
    trainer = trainer_for(model, settings, plan, random_rows(facts.vocab_size, settings, settings.length - response, response))
    trainer._tell = notices.append
    try:
        trainer.train()  # type: ignore[attr-defined]
    except torch.OutOfMemoryError as error:
        notices.append(str(error).splitlines()[0])
    if setting.is_small:
        setting.says(case, WRONG if notices else MEASURED, {}, notices[0] if notices else "a CPU has no limit of memory")
        return
    figures |= {"measured": torch.cuda.max_memory_allocated() / GIB, "reserved": torch.cuda.max_memory_reserved() / GIB}
    figures["context"] = context_bytes() / GIB
    setting.says(case, WRONG if notices else RIGHT, figures, notices[0] if notices else "")


def _without_limit(size: int) -> str | None:
    """The fault of a limit that lets the whole card be taken once more, next to the model."""
    try:
        torch.empty(size, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return None
    return "the limit of memory does not act: a card is not imitated"


def fitted(lines: list[dict[str, Any]]) -> list[tuple[str, list[tuple[Column, Any]]]]:
    """The notes of the table: errors of the bill, and context and slack by least squares."""
    models = [line["figures"] for line in lines if "error" in line["figures"]]
    notes = []
    if models:
        errors = [figures["error"] for figures in models]
        shown = (len(errors), sum(errors) / len(errors), max(errors))
        notes.append((ERRORS_NOTE, list(zip(ERRORS, shown, strict=True))))
    points = [(figures["measured"], figures["reserved"] + figures["context"]) for figures in models if "reserved" in figures]
    if (fit := line_through(points)) is not None:
        notes.append((FIT_NOTE, list(zip(FIT, (len(points), fit[0], fit[1] - 1), strict=True))))
    return notes


def line_through(points: list[tuple[float, float]]) -> tuple[float, float] | None:
    """(start, slope) of the line nearest to the points by least squares; None for fewer than two places."""
    if len({x for x, _ in points}) < 2:
        return None
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / sum((x - x_mean) ** 2 for x, _ in points)
    return y_mean - slope * x_mean, slope


ERRORS_NOTE = "{measured_rows} rows: mean error {mean_error}, worst {worst_error}."
ERRORS = (
    Column("measured_rows", "rows"),
    Column("mean_error", "share", "{:.1%}", (0, 0.05)),
    Column("worst_error", "share", "{:.1%}", (0, 0.1)),
)
FIT_NOTE = "Of {fitted_rows} rows: a context of {context} GB, and a slack of {slack} of what is allocated."
FIT = (
    Column("fitted_rows", "rows"),
    Column("context", "GB", "{:.2f}", (0, 0.2)),
    Column("slack", "share", "{:.1%}", (0, 0.03)),
)
ORDER: tuple[tuple[str, int | None, float], ...] = (
    ("8B", 4, 22),
    ("8B", None, 20),
    ("1B", None, 10),
    ("3B", 4, 14),
    ("1B", 4, 10),
    ("8B", 8, 18),
    ("3B", None, 12),
    ("1B", 8, 10),
    ("3B", 8, 12),
)


def _checks() -> list[Check]:
    made = [
        Check(f"bill/{name}{f'-{bits}bit' if bits else ''}", partial(rows, name=name, bits=bits), seconds)
        for name, bits, seconds in ORDER
    ]
    cards = [Check(f"bill/card-{vram}", partial(card, vram=vram), 15) for vram in CARDS_GB]
    in_ram = Check("bill/8B-4bit-in-ram", partial(rows, name="8B", bits=4, in_ram=True), 25)
    return [*made[:4], *cards, in_ram, *made[4:]]


PART = Part(
    "bill",
    "gpu-memory",
    0.28,
    _checks(),
    (
        Column("predicted", "GB", "{:.2f} GB", (0.02, 0)),
        Column("measured", "GB", "{:.2f} GB", (0.1, 0)),
        Column("error", "share", "{:.1%}", (0, 0.1)),
        Column("reserved", "GB", "{:.2f} GB"),
        Column("context", "GB", "{:.2f} GB"),
    ),
    after=fitted,
)
