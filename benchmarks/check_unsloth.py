"""The provider "unsloth" next to "huggingface": the same few steps of SmolLM2, the same figures, one adapter for both.

For `make check-unsloth`, in the virtual environment that has Unsloth. Where there is no GPU, Unsloth runs without its kernels:
seconds and memory then say nothing of them, and the numbers must agree all the more.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import baseline
import torch
from baseline import Column, Table
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# float32, so that no difference is rounding; plain rows, as Unsloth takes no others.
SETTINGS = ("max_steps=4", "per_device_train_batch_size=4", "max_seq_length=128", "eval_split=0.1", "bf16=false", "fp16=false")
NOISE = 1e-4 if DEVICE == "cpu" else 1e-2  # of a figure; a GPU's kernels round otherwise
COLUMNS = (
    Column("figure"),
    Column("unsloth", "as named", "{:.6g}"),
    Column("huggingface", "as named", "{:.6g}"),
    Column("apart", "as named", "{:.1g}"),
)


def dpo(*words: object) -> dict[str, Any]:
    """What a command prints with --json, from a process of its own."""
    command = [str(Path(sys.executable).parent / "dpo"), *map(str, words), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def train(provider: str, run: Path, *more: str) -> dict[str, Any]:
    words = [f"provider={provider}", f"device={DEVICE}", "prompt_sharing=false", f"output_dir={run}", *SETTINGS, *more]
    summary = dpo("train", "configs/quickstart.json", *words)
    assert ("Unsloth" in (run / "train.log").read_text(encoding="utf-8")) == (provider == "unsloth"), "another loader ran"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {**summary, "losses": [line["loss"] for line in lines if line["split"] == "train"]}


def measure(table: Table, options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        runs = {provider: Path(name) / provider for provider in ("unsloth", "huggingface")}
        ours, theirs = (train(provider, run) for provider, run in runs.items())
        on, too = (train(provider, Path(name) / f"{provider}-on", f"model_name={runs['unsloth']}") for provider in runs)
        weights, others = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs.values())
        judged = dpo("eval", runs["unsloth"])  # by the provider huggingface
    apart = max(float((weights[key] - others[key]).abs().max()) for key in weights)
    moved = sum(bool(value.any()) for key, value in weights.items() if "lora_B" in key)
    rows: list[tuple[str, float, float, float | None]] = [  # what, unsloth's, huggingface's, how far apart they may be
        ("loss of step 1 (ln 2 = 0.693147)", ours["losses"][0], theirs["losses"][0], NOISE),
        (f"loss of step {len(ours['losses'])}", ours["losses"][-1], theirs["losses"][-1], NOISE),
    ]
    for number, what in ((0, "1, continuing the adapter of the unsloth run"), (-1, f"{len(on['losses'])} of that")):
        rows.append((f"loss of step {what}", on["losses"][number], too["losses"][number], NOISE))
    for figure in ("margin", "accuracy", "kl_token"):
        values = [summary["eval"][figure]["value"] for summary in (ours, theirs)]
        rows.append((f"held-out {figure}, each run's own judgement", *values, NOISE))
        again = judged["policy"][figure]["value"]
        rows.append((f"held-out {figure} of the unsloth run, and by `dpo eval`", values[0], again, NOISE))
    rows.append(("seconds of the steps", ours["seconds"], theirs["seconds"], None))
    rows.append(("peak memory, GB", ours["memory"]["measured_gb"], theirs["memory"]["measured_gb"], None))
    for what, one, other, _ in rows:
        table.add(what, one, other, abs(one - other))
    table.add("largest difference of an adapter's weight", None, None, apart)
    layers = ((Column("moved", "layers"), moved), (Column("layers", "layers"), len(weights) // 2))
    table.note("{moved} of {layers} LoRA layers have moved." + f" {', '.join(SETTINGS)}, {DEVICE}.", *layers)
    table.note(f"unsloth {version('unsloth')}, unsloth_zoo {version('unsloth_zoo')}.")
    agree = all(abs(one - other) <= allowed for _, one, other, allowed in rows if allowed is not None)
    starts = [run["losses"][0] for run in (ours, on)]  # an adapter that is gone on from is its own reference
    sound = all(math.isclose(loss, math.log(2), abs_tol=1e-5) for loss in starts) and moved == len(weights) // 2
    table.note("The providers agree." if agree and sound else "THE PROVIDERS DO NOT AGREE.")
    return int(not (agree and sound))


if __name__ == "__main__":
    sys.exit(baseline.main("unsloth", COLUMNS, measure))
