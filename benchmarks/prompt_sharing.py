"""Each prompt once against TRL's padded rows: `dpo train` on the same multi-turn pairs, in turns; seconds and peak memory.

TRL's own head is a Triton kernel; where there is no GPU, the plain path (TRL's rows, our head) is what TRL would do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import baseline
from baseline import EXACT, Column, Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from builders import conversation_pairs  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MICRO_BATCHES = (2, 4)
STEPS, ROUNDS = 2, 3
PATHS = {"each prompt twice": "false", "each prompt once": "true"}
COLUMNS = (
    Column("micro-batch"),
    Column("scoring"),
    Column("tokens", "tokens", "{:,}", EXACT),
    Column("seconds", "s", "{:.1f}"),
    Column("faster", "ratio", "{:.2f}x", (0.25, 0)),
    Column("peak memory", "GB", "{:.2f} GB"),
    Column("of the memory", "ratio", "{:.2f}", (0.15, 0)),
)
APART = Column("apart", "nats", "{:.0e}", (0, 0.02))  # bfloat16
NOTE = (
    "{steps} steps a run, {rounds} runs of each in turns, ratios of neighbours, {dtype}; the losses of both differ by {apart} "
    "at most. Not in the seconds: loading, and the pairs that a run with shared prompts scores both ways before its first step."
)


def train(data: Path, run: Path, batch: int, sharing: str) -> dict[str, Any]:
    """A short training as its own process: seconds of the steps alone, peak memory of the process, losses."""
    config = {
        "model_name": str(MODEL),
        "dataset": str(data),
        "eval_split": 0,
        "max_seq_length": 4096,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": STEPS,
    }
    file = run.with_suffix(".json")
    file.write_text(json.dumps(config), encoding="utf-8")
    words = ["train", file, f"prompt_sharing={sharing}", f"output_dir={run}", "--overwrite", "--json"]
    dpo = Path(sys.executable).parent / "dpo"
    done = subprocess.run([dpo, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "seconds": json.loads(done.stdout)["seconds"],
        "memory": lines[-1]["peak_memory_gb"],
        "losses": [line["loss"] for line in lines],
        "counts": plan["counts"],
        "dtype": "bfloat16" if plan["config"]["bf16"] else "float32",
    }


def measure(table: Table, options: argparse.Namespace) -> None:
    apart, rounds = [], 1 if options.small else ROUNDS
    with tempfile.TemporaryDirectory() as place:
        for batch in MICRO_BATCHES[: 1 if options.small else None]:
            data = Path(place) / f"pairs-{batch}.jsonl"
            rows = conversation_pairs(batch * STEPS, turn_words=5 if options.small else 60, answer_words=30)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PATHS}
            for _ in range(rounds):
                for name, sharing in PATHS.items():
                    runs[name].append(train(data, Path(place) / "run", batch, sharing))
            twice, once = (runs[name] for name in PATHS)
            faster = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(twice, once, strict=True))
            memory = statistics.median(b["memory"] / a["memory"] for a, b in zip(twice, once, strict=True))
            tokens = [once[0]["counts"][name] for name in ("train_tokens", "shared_tokens")]
            for (name, made), count, ratios in zip(runs.items(), tokens, ((1.0, 1.0), (faster, memory)), strict=True):
                peak = statistics.median(run["memory"] for run in made)
                table.add(batch, name, count, [run["seconds"] for run in made], ratios[0], peak, ratios[1])
            apart += [abs(a - b) for a, b in zip(twice[0]["losses"], once[0]["losses"], strict=True)]
    counts = [
        (Column("steps", "steps"), STEPS),
        (Column("rounds", "runs"), rounds),
        (Column("dtype", "dtype"), once[0]["dtype"]),
    ]
    table.note(NOTE, *counts, (APART, max(apart)))


if __name__ == "__main__":
    sys.exit(baseline.main("prompt-sharing", COLUMNS, measure))
