"""Two trainings on the same cores, in turns with one: how OpenMP's waiting decides what they cost each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import machine_line

ROOT = Path(__file__).parent.parent
SETTINGS = {"300,000 spins (libgomp's default)": "300000", "10,000 spins (what dpo sets)": "10000"}


def seconds(count: int, spin: str) -> float:
    """Seconds of the slowest of `count` trainings of three steps that run at the same time."""
    environment = {**os.environ, "GOMP_SPINCOUNT": spin}
    with tempfile.TemporaryDirectory() as place:
        dpo = Path(sys.executable).parent / "dpo"
        words = [dpo, "train", "configs/quickstart.json", "max_steps=3", "eval_split=0", "--json"]
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


def main() -> None:
    print("| waiting threads | one training | two at once | ratio |\n|---|---|---|---|")
    for name, spin in SETTINGS.items():
        alone, together = seconds(1, spin), seconds(2, spin)
        print(f"| {name} | {alone:.1f} s | {together:.1f} s | {together / alone:.1f} |", flush=True)
    print(f"\nthree steps of the quickstart. {machine_line()}.")


if __name__ == "__main__":
    main()
