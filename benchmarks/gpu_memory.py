"""The memory bill against a GPU: real steps of real shapes with random weights, predicted and measured peak of each.

    python benchmarks/gpu_memory.py --keep    on a CUDA machine
    python benchmarks/gpu_memory.py --small   on a CPU, with tiny shapes, to see that it runs

It needs torch and the packages of this repository, downloads nothing, and stops after `--minutes`. What could not be run (no
bitsandbytes, out of memory) is a row that says so. Measured is torch's own peak of allocated bytes, which a bill without
context and slack predicts; reserved bytes and the context are printed with it.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import baseline
import torch
from baseline import Column, Table
from step_memory import billed, plan_of, random_model, step_peak, trainer_for
from transformers import LlamaConfig, PreTrainedModel

from dpo_cli.hardware.machine import GIB
from dpo_cli.hardware.memory import components
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.models.shape import ModelFacts, known_models
from dpo_cli.models.source import ModelSource

MODELS = ("meta-llama/Llama-3.2-1B-Instruct", "meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.1-8B-Instruct")
BITS = (None, 4, 8)
MINUTES = 8.0
RESPONSE_SHARE = 0.25  # of a sequence
BASE = Settings(batch=2, length=1024, rank=16, bytes_per_value=2, checkpointing=True)
# One thing changed at a time, then the corners; the flag says whether prompts go through once.
GRID: tuple[tuple[Settings, bool], ...] = (
    (BASE, True),
    (replace(BASE, length=512), True),
    (replace(BASE, length=2048), True),
    (replace(BASE, length=4096, batch=1), True),
    (replace(BASE, batch=1), True),
    (replace(BASE, batch=8), True),
    (replace(BASE, rank=64), True),
    (replace(BASE, checkpointing=False, length=512), True),
    (replace(BASE, checkpointing=False, batch=1), True),
    (BASE, False),
    (replace(BASE, length=4096, batch=4, rank=64), True),
)


def shapes(device: str) -> Iterator[tuple[str, ModelFacts]]:
    """The models to measure; on a CPU the first one's shape divided by sixteen, with four blocks."""
    for name in MODELS:
        facts = ModelSource.of(name).facts
        assert facts is not None
        if device == "cpu":
            small = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 4096}
            yield f"{name}, tiny", replace(facts, **small, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
            return
        yield name, facts


def config_of(facts: ModelFacts) -> LlamaConfig:
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    shape = {name: getattr(facts, name) for name in names}
    return LlamaConfig(**shape, vocab_size=facts.vocab_size, tie_word_embeddings=facts.tie_word_embeddings)


def measure(
    model: PreTrainedModel, facts: ModelFacts, settings: Settings, shared: bool, device: str, place: Path
) -> dict[str, Any]:
    """One row: the bill of the settings and what torch allocated at its most, in GB."""
    response = max(2, int(RESPONSE_SHARE * settings.length))
    prompt = settings.length - response
    plan = plan_of(settings, settings.length, shared, device, place)
    known = billed(plan, facts, prompt, response)
    parts = {name: size / GIB for name, size in components(facts, replace(known, on_gpu=False)).items()}
    row: dict[str, Any] = {"settings": known, "shared": shared, "predicted_gb": sum(parts.values())}
    model.gradient_checkpointing_disable()
    trainer = None
    try:
        trainer = trainer_for(model, known, plan, prompt, response, device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["step_gb"] = step_peak(trainer, device) / GIB
        if device == "cuda":
            row["measured_gb"] = torch.cuda.max_memory_allocated() / GIB
            row["reserved_gb"] = torch.cuda.max_memory_reserved() / GIB
            free, total = torch.cuda.mem_get_info()
            row["context_gb"] = (total - free - torch.cuda.memory_reserved()) / GIB
        else:  # a CPU process has no counter of its own: what comes and goes is measured, the rest taken from the bill
            row["measured_gb"] = row["step_gb"] + sum(parts.values()) - parts["activations"] - parts["scoring"]
    except torch.OutOfMemoryError as error:
        row["failed"] = str(error).splitlines()[0]
    finally:
        if trainer is not None:
            trainer.model.unload()
        del trainer
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return row


def rows(device: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Every model in every precision over the grid, until the time is over."""
    for name, facts in shapes(device):
        for bits in BITS:
            if time.monotonic() > deadline:
                return
            about = {"model": name, "bits": bits}
            try:
                model = random_model(config_of(facts), replace(BASE, bits=bits), device)
            except (ImportError, RuntimeError) as error:  # bitsandbytes is not there, or has no kernels for this machine
                yield {**about, "failed": (str(error) or type(error).__name__).splitlines()[0]}
                continue
            for settings, shared in GRID:
                if time.monotonic() > deadline:
                    break
                smaller = replace(settings, length=settings.length // 8) if device == "cpu" else settings
                with tempfile.TemporaryDirectory() as place:
                    measured = measure(model, facts, replace(smaller, bits=bits), shared, device, Path(place))
                yield {**about, **measured}
            del model
            gc.collect()


COLUMNS = (
    *map(Column, ("model", "bits", "batch", "tokens", "rank", "checkpointing", "prompts")),
    Column("predicted", "GB", "{:.2f} GB", (0.02, 0)),
    Column("measured", "GB", "{:.2f} GB", (0.1, 0)),
    Column("ratio", "predicted / measured", "{:.3f}", (0.1, 0)),
    Column("reserved", "GB", "{:.2f} GB"),
    Column("context", "GB", "{:.2f} GB"),
    Column("failed", "reason"),
)
NOTE = "{measured_rows} rows: mean error {mean_error}, worst {worst_error}."
ERRORS = (
    Column("measured_rows", "rows"),
    Column("mean_error", "share", "{:.1%}", (0, 0.05)),
    Column("worst_error", "share", "{:.1%}", (0, 0.1)),
)


def cells(row: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    settings, measured = row.get("settings"), row.get("measured_gb")
    told = [row["model"].split("/")[-1], row["bits"] or 16]
    if settings is None:
        told += [None] * 5
    else:
        told += [settings.batch, settings.length, settings.rank, "yes" if settings.checkpointing else "no"]
        told += ["once" if row["shared"] else "twice"]
    ratio = row["predicted_gb"] / measured if measured else None
    return [*told, row.get("predicted_gb"), measured, ratio, row.get("reserved_gb"), row.get("context_gb"), row.get("failed")]


def measure_all(table: Table, options: argparse.Namespace) -> None:
    assert all(name in known_models() for name in MODELS)
    logging.disable(logging.WARNING)
    device, errors = "cpu" if options.small else "cuda", []
    for row in rows(device, time.monotonic() + 60 * options.minutes):
        table.add(*cells(row))
        if "measured_gb" in row:
            errors.append(abs(row["predicted_gb"] / row["measured_gb"] - 1))
    if errors:
        table.note(NOTE, *zip(ERRORS, (len(errors), sum(errors) / len(errors), max(errors)), strict=True))


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--minutes", type=float, default=MINUTES)
    sys.exit(baseline.main("gpu-memory", COLUMNS, measure_all, asked))
