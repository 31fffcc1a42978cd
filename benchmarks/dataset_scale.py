"""What a dataset of real lengths costs before the first step: `dpo validate`, and the plan of `dpo train`, twice.

The pairs have the lengths of UltraFeedback's: prompts of about 60 words and answers of about 200, of words of data-samples. One
prompt in ten is too long for max_seq_length. Each command is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import baseline
from baseline import Column, Table

ROOT = Path(__file__).parent.parent
DPO = str(Path(sys.executable).parent / "dpo")
SIZES = (1_000, 10_000, 61_000)
LARGE = 1_000_000  # with --large
COLUMNS = (
    Column("pairs", "", "{:,}"),
    Column("file", "GB", "{:.2f} GB"),
    Column("validate", "s", "{:.1f}"),
    Column("its memory", "GB", "{:.2f} GB", (0.15, 0.05)),
    Column("plan", "s", "{:.1f}"),
    Column("a pair", "ms", "{:.2f}"),
    Column("plan again", "s", "{:.1f}"),
    Column("memory of the plan", "GB", "{:.2f} GB", (0.15, 0.05)),
)


def write(path: Path, count: int) -> None:
    """`count` pairs; all texts differ."""
    draw = random.Random(0)
    words = (ROOT / "data-samples" / "concise-prompts.txt").read_text("utf-8").split()

    def text(median: int, number: int) -> str:
        length = min(3000, max(3, round(median * math.exp(draw.gauss(0, 0.7)))))
        return f"{number} " + " ".join(draw.choices(words, k=length))

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            medians = {"prompt": 800 if number % 10 == 9 else 60, "chosen": 200, "rejected": 170}
            row = {key: text(median, number) for key, median in medians.items()}
            file.write(json.dumps(row) + "\n")


def cost(*words: object) -> tuple[float, float]:
    """Seconds and peak memory in GB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen([DPO, *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"dpo {words[0]} failed: {said}")
    return time.perf_counter() - started, used.ru_maxrss / 2**20


def measure(table: Table, options: argparse.Namespace) -> None:
    sizes = (1_000,) if options.small else (*SIZES, LARGE) if options.large else SIZES
    with tempfile.TemporaryDirectory() as place:
        for size in sizes:
            data = Path(place) / f"{size}.jsonl"
            write(data, size)
            values = [f"dataset={data}", f"output_dir={place}/run", "max_seq_length=1024", "eval_split=0.01", "max_steps=10"]
            seconds, memory = cost("validate", "configs/quickstart.json", *values)
            first, peak = cost("train", "configs/quickstart.json", *values, "--dry-run")
            again, _ = cost("train", "configs/quickstart.json", *values, "--dry-run")
            table.add(size, data.stat().st_size / 2**30, seconds, memory, first, 1000 * first / size, again, peak)
            data.unlink()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} pairs: an hour")
    sys.exit(baseline.main("dataset-scale", COLUMNS, measure, parser))
