"""Each prompt once against TRL's padded rows: `dpo train` on the same multi-turn pairs, in turns; seconds and peak memory.

TRL's own head is a Triton kernel; where there is no GPU, the plain path (TRL's rows, our head) is what TRL would do.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import machine_line

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from builders import conversation_pairs  # noqa: E402

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MICRO_BATCHES = (2, 4)
STEPS, ROUNDS = 2, 3
PATHS = {"each prompt twice": "false", "each prompt once": "true"}


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


def main() -> None:
    print("| micro-batch | scoring | seconds | ratio | peak memory | ratio |\n|---|---|---|---|---|---|")
    notes = []
    with tempfile.TemporaryDirectory() as place:
        for batch in MICRO_BATCHES:
            data = Path(place) / f"pairs-{batch}.jsonl"
            rows = conversation_pairs(batch * STEPS, turn_words=60, answer_words=30)
            data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PATHS}
            for _ in range(ROUNDS):
                for name, sharing in PATHS.items():
                    runs[name].append(train(data, Path(place) / "run", batch, sharing))
            twice, once = (runs[name] for name in PATHS)
            pace = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(twice, once, strict=True))
            memory = statistics.median(b["memory"] / a["memory"] for a, b in zip(twice, once, strict=True))
            for name, made in runs.items():
                seconds = ", ".join(f"{run['seconds']:.1f}" for run in made)
                peak = statistics.median(run["memory"] for run in made)
                ratios = (f"{pace:.2f}x", f"{memory:.2f}") if made is once else ("1", "1")
                print(f"| {batch} | {name} | {seconds} | {ratios[0]} | {peak:.2f} GB | {ratios[1]} |", flush=True)
            counts = once[0]["counts"]
            apart = max(abs(a - b) for a, b in zip(twice[0]["losses"], once[0]["losses"], strict=True))
            notes.append(
                f"micro-batches of {batch}: {counts['train_pairs']} pairs, {counts['train_tokens']} tokens, "
                f"{counts['shared_tokens']} with each prompt once; losses differ by {apart:.0e} at most"
            )
    print(
        f"\n{STEPS} steps a run, {ROUNDS} runs of each in turns, ratios of neighbours, {once[0]['dtype']}. Not in the seconds:"
    )
    print("loading, and the two pairs that a run with shared prompts scores both ways before its first step.")
    print(".\n".join([*notes, machine_line()]) + ".")


if __name__ == "__main__":
    main()
