"""`dpo train` against plain TRL in its own virtual environment, in turns, on the same pairs: seconds, peak memory, step losses.

python benchmarks/speed.py [WORKLOAD ...] [--rounds N] [--float32]

TRL runs its better way: the reference within each step, or precomputed. Workloads with real answers read ../shared/data and are
skipped without it. Seconds are those of training, without loading; peak memory is that of the process. Each run starts with an
empty cache; only "second run" has what a run with another beta has left, in TRL's cache too. The floor is the time that the
operations of the maths take at the rate of this machine's products (benchmarks/floor.py).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import baseline
import floor
import torch
from baseline import Column, Table

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from builders import conversation_pairs  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from dpo_cli.data.rows import to_pair  # noqa: E402
from dpo_cli.data.tokens import encode  # noqa: E402
from dpo_cli.models.model_files import ModelFiles  # noqa: E402
from dpo_cli.providers.model_cache import dequantised  # noqa: E402
from dpo_cli.storage.user_cache import cache_dir  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
COLUMNS = (
    Column("workload"),
    Column("dtype"),
    Column("pairs", "pairs", "{}"),
    Column("steps", "steps", "{}"),
    Column("TRL", "s", "{:.1f}"),
    Column("dpo", "s", "{:.1f}"),
    Column("faster", "ratio", "{:.2f}x", (0.25, 0)),
    Column("peak memory, TRL", "GB", "{:.2f} GB"),
    Column("peak memory, dpo", "GB", "{:.2f} GB"),
    Column("of the memory", "ratio", "{:.2f}", (0.15, 0)),
    Column("largest difference of a step's loss", "nats", "{:.1e}"),
    Column("floor", "s", "{:.1f}"),
    Column("of the floor", "ratio", "{:.2f}", (0.25, 0)),
)


LOSSES = 2  # steps in float32, the second with weights that the first has changed


def _messages(row: dict[str, str]) -> dict[str, Any]:
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def _file(name: str) -> Callable[[int], list[dict[str, Any]] | None]:
    def rows(count: int) -> list[dict[str, Any]] | None:
        if not (SHARED / name).exists():
            return None
        with (SHARED / name).open(encoding="utf-8") as lines:
            return [_messages(json.loads(line)) for line in islice(lines, count)]

    return rows


@dataclass(frozen=True)
class Workload:
    """Pairs, and what differs from the common config."""

    pairs: int
    rows: Callable[[int], list[dict[str, Any]] | None]
    config: dict[str, Any] = field(default_factory=dict)
    is_second: bool = False  # after a run of the same pairs with another beta

    @property
    def ways(self) -> tuple[bool, ...]:
        """TRL's ways that can be the faster one: the reference precomputed or not. With more epochs or a cache it is."""
        return (True,) if self.is_second or "num_train_epochs" in self.config else (False, True)


def _conversations(count: int) -> list[dict[str, Any]]:
    return conversation_pairs(count, turn_words=40, answer_words=40)


WORKLOADS = {
    "multi-turn": Workload(24, _conversations),
    "short answers": Workload(64, _file("truthfulqa.train.jsonl")),
    "long answers": Workload(16, _file("ultrafeedback_1k.train.jsonl")),
    "multi-turn, 3 epochs": Workload(24, _conversations, {"num_train_epochs": 3}),
    "multi-turn, second run": Workload(24, _conversations, {"beta": 0.5}, is_second=True),
}
COMMON = {
    "model_name": str(MODEL),
    "eval_split": 0,
    "num_train_epochs": 1,
    "max_seq_length": 4096,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "gradient_checkpointing": False,
    "learning_rate": 5e-6,
    "lora_r": 16,
    "lora_alpha": 32,
}


def child(command: list[str | Path], cache: Path) -> tuple[dict[str, Any], float]:
    """What a process prints as JSON, and its peak memory in GB. It keeps things for later runs in `cache`."""
    (cache / "dpo").mkdir(parents=True, exist_ok=True)
    if not (converted := cache / "dpo" / "gguf").exists():
        converted.symlink_to(cache_dir() / "gguf")
    caches = {"XDG_CACHE_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    environment = {**os.environ, **caches, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, log):
            file.seek(0)
        if process.returncode:
            raise SystemExit(f"{command}: exit {process.returncode}\n{log.read().decode()[-3000:]}")
        return json.loads(out.read()), usage.ru_maxrss / 2**20


def run_dpo(place: Path, data: Path, config: dict[str, Any], cache: Path) -> dict[str, Any]:
    run, file = place / "run", place / "dpo.json"
    file.write_text(json.dumps({**COMMON, **config, "dataset": str(data), "output_dir": str(run)}), encoding="utf-8")
    dpo = Path(sys.executable).parent / "dpo"
    summary, peak_gb = child([dpo, "train", file, "--overwrite", "--json"], cache)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"seconds": summary["seconds"], "peak_gb": peak_gb, "losses": losses, "config": plan["config"]}


def run_trl(place: Path, data: Path, config: dict[str, Any], precompute: bool, cache: Path) -> dict[str, Any]:
    job = {
        "model": str(dequantised(ModelFiles(MODEL))),
        "rows": str(data),
        "output_dir": str(place / "trl"),
        "config": {**config, "max_steps": config["max_steps"] or -1},
        "precompute": precompute,
    }
    file = place / "trl.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    result, peak_gb = child([TRL_PYTHON, ROOT / "benchmarks" / "peers" / "trl_training.py", file], cache)
    return {**result, "peak_gb": peak_gb}


def floor_seconds(rows: list[dict[str, Any]], workload: Workload, dtype: torch.dtype) -> float:
    """The time of the operations of a training at the rate of this machine's products."""
    model = dequantised(ModelFiles(MODEL))
    encoded = encode([to_pair(row, i + 1) for i, row in enumerate(rows)], AutoTokenizer.from_pretrained(model))
    pairs = [floor.Pair(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in encoded]
    sizes = floor.Model.of(json.loads((model / "config.json").read_text(encoding="utf-8")), COMMON["lora_r"])
    epochs = workload.config.get("num_train_epochs", COMMON["num_train_epochs"])
    return floor.operations(sizes, pairs, epochs, with_reference=not workload.is_second) / floor.rate(dtype)


def measure(table: Table, options: argparse.Namespace) -> None:
    trl = ""
    given = {"bf16": False, "fp16": False, "max_steps": LOSSES} if options.float32 else {}
    for name in options.workloads or WORKLOADS:
        workload = WORKLOADS[name]
        rows = workload.rows(workload.pairs)
        if rows is None:
            table.note(f"{name}: skipped, {SHARED} is missing.")
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            data = place / "pairs.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            ours: list[dict[str, Any]] = []
            theirs: list[dict[str, Any]] = []
            for i in range(options.rounds):
                cache = place / f"cache-{i}"
                if workload.is_second:
                    first = run_dpo(place, data, given, cache)
                    run_trl(place, data, first["config"], True, cache)
                ours.append(run_dpo(place, data, {**workload.config, **given}, cache))
                tried = workload.ways[:1] if options.float32 else workload.ways  # the losses of both are the same
                ways = [run_trl(place, data, ours[0]["config"], way, cache) for way in tried]
                theirs.append(min(ways, key=lambda run: run["seconds"]))
        faster = [trl["seconds"] / dpo["seconds"] for trl, dpo in zip(theirs, ours, strict=True)]
        peaks = [statistics.median(run["peak_gb"] for run in runs) for runs in (theirs, ours)]
        apart = max(abs(a - b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True))
        seconds = [[run["seconds"] for run in runs] for runs in (theirs, ours)]
        dtype = "bfloat16" if ours[0]["config"]["bf16"] else "float32"
        steps = len(ours[0]["losses"])
        least = floor_seconds(rows, workload, getattr(torch, dtype))
        share = least / statistics.median(run["seconds"] for run in ours)
        shares = (statistics.median(faster), *peaks, peaks[1] / peaks[0], apart, least, share)
        table.add(name, dtype, len(rows), steps, *seconds, *shares)
        trl = theirs[0]["trl"]
    rounds = (Column("rounds", "runs"), options.rounds)
    table.note("TRL {trl}, in its faster way; {rounds} run(s) of each in turns.", (Column("trl", "version"), trl), rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--float32", action="store_true", help=f"compute {LOSSES} steps in float32, to compare losses")
    sys.exit(baseline.main("speed", COLUMNS, measure, parser))
