"""Weights that are divided over processes, or wait in the RAM: bytes of the bill and bytes that were counted: `make divided`.

The measured rows run a small model with random weights in processes of this machine: what each holds, and what a forward pass
of two tokens takes at its peak, which is the whole blocks. The planned rows are bills of known models for a card.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import baseline
from baseline import Column, Table

from dpo_cli.hardware.memory import bill, host_bytes
from dpo_cli.hardware.memory_inputs import Settings
from dpo_cli.hardware.weights import divided_bytes, gathered_bytes, weight_bytes
from dpo_cli.models.shape import known_models

ONE = "one-of-many"  # the word that makes this script one of the processes
RULE = (1e-5, 0.0)  # a later figure differs only where the bill does
GIB = 2**30
COLUMNS = (
    Column("model"),
    Column("weights"),
    Column("processes"),
    Column("waiting"),
    Column("all weights", "GiB", "{:.4g}", RULE),
    Column("on the device", "GiB", "{:.4g}", RULE),
    Column("whole blocks", "GiB", "{:.4g}", RULE),
    Column("counted: on the device", "GiB", "{:.4g}", (0.001, 0)),
    Column("counted: whole blocks", "GiB", "{:.4g}", (0.1, 0)),
    Column("the whole bill", "GiB", "{:.4g}", RULE),
    Column("RAM", "GiB", "{:.4g}", RULE),
)
PLANNED = Settings(
    *(1, 1024, 16, 2, True), bits=4, optimizer="paged_adamw_8bit", pair_tokens=1280, response_tokens=512, strategy="dpo"
)
MODELS = {"8B": "meta-llama/Llama-3.1-8B-Instruct", "70B": "meta-llama/Llama-3.1-70B-Instruct"}
SIZES = {"hidden_size": 1024, "intermediate_size": 3072}
# (model, quantised to, processes, whether shards wait in the RAM)
GRID: tuple[tuple[str, int | None, int, bool], ...] = (
    *(("8B", 4, 1, False), ("8B", 4, 1, True), ("8B", None, 1, False), ("8B", None, 1, True), ("8B", None, 4, False)),
    *(("70B", 4, 1, True), ("70B", 4, 4, False), ("70B", 4, 8, False), ("70B", None, 16, False), ("70B", None, 64, False)),
)


def counted() -> list[float]:
    """In one of several processes, or alone: bytes of all weights, of those that this process holds by the bill and counted,
    and of whole blocks by the bill and counted."""
    import step_memory
    import torch
    from transformers import LlamaConfig

    from dpo_cli.models.shape import config_facts
    from dpo_cli.providers.sharding import shard
    from dpo_cli.storage.world import Place, Processes, World

    torch.set_num_threads(1)
    place = Place.of(os.environ)
    world = Processes(place, 60) if place else World()
    larger: dict[str, Any] = {**step_memory.SHAPE, **step_memory.HEADS, **SIZES, "tie_word_embeddings": False}
    shape = LlamaConfig(**larger)
    settings = replace(step_memory.HALF, shards=world.size, in_ram=world.size == 1)
    model = step_memory.random_model(shape, settings, "cpu")
    shard(model, torch.device("cpu"), world, settings.in_ram)
    held = sum(getattr(weight, "_local_tensor", weight).nbytes for weight in model.parameters())
    with step_memory.measured("cpu") as peak, torch.no_grad():
        model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=False)
    facts = config_facts(shape.to_dict())
    assert facts is not None
    divided, gathered = divided_bytes(facts, settings), gathered_bytes(facts, settings)
    return [weight_bytes(facts, settings), divided, held, gathered, peak.bytes]


def in_processes(count: int) -> list[list[float]]:
    """What each of so many processes counts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, ONE]
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    nodes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=rank) for rank in ranks]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    if any(node.returncode for node in nodes):
        raise SystemExit(f"one of {count} processes failed")
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(table: Table, options: argparse.Namespace) -> None:
    for count in (1,) if options.small else (1, 2, 4):
        whole, divided, held, gathered, peak = max(in_processes(count), key=lambda figures: figures[4])
        sizes = [size / GIB for size in (whole, divided, gathered, held, peak)]
        table.add("6 blocks", "bf16", count, "in the RAM, which is the device" if count == 1 else "", *sizes, None, None)
    predict(table)


def predict(table: Table) -> None:
    """The bills of known models."""
    for name, bits, processes, in_ram in GRID:
        facts, settings = known_models()[MODELS[name]], replace(PLANNED, bits=bits, shards=processes, in_ram=in_ram)
        whole = weight_bytes(facts, settings)
        divided = divided_bytes(facts, settings) if settings.is_divided else whole
        sizes = [size / GIB for size in (whole, divided, gathered_bytes(facts, settings))]
        total, ram = bill(facts, settings, None).total_gb, host_bytes(facts, settings) / GIB
        dtype = f"{bits}-bit" if bits else "bf16"
        table.add(name, dtype, processes, "in the RAM" if in_ram else "", *sizes, None, None, total, ram)
    table.note(
        "Planned for a GPU: rank {rank}, one pair of {tokens} tokens with its prompt once, checkpointed, paged_adamw_8bit.",
        (Column("rank"), PLANNED.rank),
        (Column("tokens"), PLANNED.pair_tokens),
    )


if __name__ == "__main__":
    if sys.argv[1:] == [ONE]:
        print(json.dumps(counted()))
        sys.exit()
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(baseline.main("divided-weights", COLUMNS, measure))
