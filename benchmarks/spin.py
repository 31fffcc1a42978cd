"""Two trainings on the same cores, in turns with one: how OpenMP's waiting decides what they cost each other."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import baseline
from baseline import Column, Table

ROOT = Path(__file__).parent.parent
COLUMNS = (
    Column("waiting threads"),
    Column("one training", "s", "{:.1f} s"),
    Column("two at once", "s", "{:.1f} s"),
    Column("ratio", "ratio", "{:.1f}", (0.3, 0)),
)
SETTINGS = {"300,000 spins (libgomp's default)": "300000", "10,000 spins (what dpo sets)": "10000"}


def seconds(count: int, spin: str, steps: int) -> float:
    """Seconds of the slowest of `count` trainings that run at the same time."""
    environment = {**os.environ, "GOMP_SPINCOUNT": spin}
    with tempfile.TemporaryDirectory() as place:
        dpo = Path(sys.executable).parent / "dpo"
        words = [dpo, "train", "configs/quickstart.json", f"max_steps={steps}", "eval_split=0", "--json"]
        runs = [
            subprocess.Popen(
                [*words, f"output_dir={place}/{number}"],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for number in range(count)
        ]
        return max(float(json.loads(run.communicate()[0])["seconds"]) for run in runs)


def measure(table: Table, options: argparse.Namespace) -> None:
    steps = 1 if options.small else 3
    for name, spin in SETTINGS.items():
        alone, together = seconds(1, spin, steps), seconds(2, spin, steps)
        table.add(name, alone, together, together / alone)
    table.note("{steps} steps of the quickstart.", (Column("steps", "steps"), steps))


if __name__ == "__main__":
    sys.exit(baseline.main("spin", COLUMNS, measure))
