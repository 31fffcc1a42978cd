"""One training in one process and in two, on this machine's cores: tokens a second, and the share of the ideal.

The ideal of two processes on two cores is twice the speed of one process on one core, with the same pairs in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import baseline
from baseline import Column, Table

ROOT = Path(__file__).parent.parent
FIRST = 2  # steps that are not counted: they compile products for new shapes
COLUMNS = (
    Column("processes"),
    Column("cores", "cores"),
    Column("tokens a second", "tokens/s", "{:,.0f}", (0.6, 0)),
    Column("of one core", "times", "{:.2f}", (0.25, 0)),
    Column("efficiency", "share", "{:.0%}", (0.25, 0)),
)


@dataclass(frozen=True)
class Way:
    """A way to train: so many processes on so many cores."""

    name: str
    processes: int
    cores: int


WAYS = (Way("one", 1, 1), Way("one, which uses both cores", 1, 2), Way("two", 2, 2))


def tokens_a_second(way: Way, place: Path, words: Sequence[str]) -> float:
    """Of the steps of a run, without the first ones. `place` keeps the model and the reference for the next run."""
    cores = sorted(os.sched_getaffinity(0))[: way.cores]
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "OMP_NUM_THREADS": str(way.cores // way.processes)}
    dpo = [str(Path(sys.executable).parent / "dpo"), "train", "configs/quickstart.json", "--processes", str(way.processes)]
    subprocess.run(
        ["taskset", "--cpu-list", ",".join(map(str, cores)), *dpo, f"output_dir={place / 'run'}", "--overwrite", *words],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates, totals = [line["tokens_per_second"] for line in lines], [line["tokens"] for line in lines]
    counted = [(now - before, rate) for before, now, rate in zip(totals, totals[1:], rates[1:], strict=False)][FIRST - 1 :]
    return float(sum(tokens for tokens, _ in counted) / sum(tokens / rate for tokens, rate in counted))


def measure(table: Table, options: argparse.Namespace) -> None:
    steps, turns = (4, 1) if options.small else (8, 2)
    words = [f"max_steps={steps}", "eval_split=0", "bf16=true"]
    rates: dict[str, list[float]] = {way.name: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        tokens_a_second(WAYS[1], Path(place), words)  # computes the reference for all
        for _ in range(turns):
            for way in WAYS:
                rates[way.name].append(tokens_a_second(way, Path(place), words))
    one = statistics.median(rates[WAYS[0].name])
    for way in WAYS:
        rate = statistics.median(rates[way.name])
        table.add(way.name, way.cores, rate, rate / one, rate / one / way.cores)
    table.note(
        "The median of {turns} runs of {steps} steps of the quickstart in bfloat16, in turns, without the first {first} steps; "
        "reference log-probs come from the cache.",
        (Column("turns", "runs"), turns),
        (Column("steps", "steps"), steps),
        (Column("first", "steps"), FIRST),
    )


if __name__ == "__main__":
    sys.exit(baseline.main("processes", COLUMNS, measure))
