"""What a dataset of real lengths costs before the first step: `dpo validate`, and the plan of `dpo train`, twice.

The pairs have the lengths of UltraFeedback's: prompts of about 60 words and answers of about 200, of words of data-samples. One
prompt in ten is too long for max_seq_length. Each command is a process of its own, and the cache is empty at first. The memory
is that of all processes of a command.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import baseline
from baseline import Column, Table

from dpo_cli.storage.user_cache import cache_dir

ROOT = Path(__file__).parent.parent
DPO = str(Path(sys.executable).parent / "dpo")
SIZES = (1_000, 10_000, 61_000)
LARGE = 1_000_000  # with --large
LOOKS = 0.2  # seconds between two looks at the memory
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


def cost(cache: Path, *words: object) -> tuple[float, float]:
    """Seconds and peak memory in GB of a command and its processes; what they share counts once."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as said:
        env = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        process = subprocess.Popen([DPO, *map(str, words)], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(LOOKS)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"dpo {words[0]} failed: {said.read().decode()}")
    return time.perf_counter() - started, peak / 2**30


def memory_of(process: int) -> int:
    """The proportional set size of a process and its children, in bytes; 0 for one that has ended."""
    place = Path(f"/proc/{process}")
    try:
        (line,) = (line for line in (place / "smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))
        children = [child for task in place.glob("task/*/children") for child in task.read_text().split()]
    except (OSError, ValueError):
        return 0
    return int(line.split()[1]) * 1024 + sum(memory_of(int(child)) for child in children)


def measure(table: Table, options: argparse.Namespace) -> None:
    sizes = (1_000,) if options.small else (*SIZES, LARGE) if options.large else SIZES
    with tempfile.TemporaryDirectory() as place:
        (cache := Path(place) / "cache" / "dpo").mkdir(parents=True)
        (cache / "gguf").symlink_to(cache_dir() / "gguf")  # the model is not converted again
        cost(cache.parent, "train", "configs/quickstart.json", f"output_dir={place}/run", "--dry-run")  # makes it, if missing
        for size in sizes:
            data = Path(place) / f"{size}.jsonl"
            write(data, size)
            values = [f"dataset={data}", f"output_dir={place}/run", "max_seq_length=1024", "eval_split=0.01", "max_steps=10"]
            seconds, memory = cost(cache.parent, "validate", "configs/quickstart.json", *values)
            shutil.rmtree(cache / "findings", ignore_errors=True)  # so that the plan is made as if it came first
            plan = ["train", "configs/quickstart.json", *values, "--dry-run"]
            first, peak = cost(cache.parent, *plan)
            again, _ = cost(cache.parent, *plan)
            table.add(size, data.stat().st_size / 2**30, seconds, memory, first, 1000 * first / size, again, peak)
            data.unlink()
            shutil.rmtree(cache / "tokens", ignore_errors=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} pairs: an hour")
    sys.exit(baseline.main("dataset-scale", COLUMNS, measure, parser))
