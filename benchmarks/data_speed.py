"""Reading and all findings over made-up short pairs, 10,000 to 1,000,000: seconds, peak memory, and what is found.

Each size is a process of its own. A thousandth of the lines is broken, a hundredth repeats an earlier pair, another nearly so.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import baseline
from baseline import EXACT, Column, Table

SURVEY = "survey"  # of a file, by a process of its own
SIZES = (10_000, 100_000, 1_000_000)
COLUMNS = (
    Column("rows", shown="{:,}"),
    Column("seconds", "s", "{:.1f}"),
    Column("microseconds a row", "µs", "{:.1f}"),
    Column("peak memory", "GB", "{:.2f} GB", (0.25, 0.05)),
    Column("found", "rows", tolerance=EXACT),
)


def write(path: Path, count: int) -> None:
    """`count` lines of pairs of 5 to 30 random words each, from 10,000 made-up ones."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(10_000)]
    earlier: dict[str, str] = {}
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            kind = draw.random()
            if earlier and kind < 0.02:
                row = dict(earlier)
                if kind < 0.01:
                    row["chosen"] += " indeed"
            else:
                row = {key: " ".join(draw.choices(words, k=draw.randint(5, 30))) for key in ("prompt", "chosen", "rejected")}
            file.write("{broken\n" if number % 1000 == 999 else json.dumps(row) + "\n")
            if number % 50 == 0:
                earlier = row


def survey(path: str) -> None:
    """In a process of its own: one pass with all findings."""
    from dpo_cli.config.schema import inner_defaults
    from dpo_cli.data.dataset import read
    from dpo_cli.data.lint import Quality

    started = time.perf_counter()
    quality = Quality(inner_defaults("quality"))
    data = read(path, observers=[quality])
    problems = [*data.problems, *quality.problems(data)]
    seconds = time.perf_counter() - started
    found = {problem.code: len(problem.lines or [1]) for problem in problems}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "rows": data.rows, "found": found}))


def measure(table: Table, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        for size in (1_000,) if options.small else SIZES:
            path = Path(place) / f"{size}.jsonl"
            write(path, size)
            done = subprocess.run([sys.executable, __file__, SURVEY, path], check=True, stdout=subprocess.PIPE, text=True)
            made = json.loads(done.stdout)
            table.add(size, made["seconds"], made["seconds"] / made["rows"] * 1e6, made["peak_gb"], made["found"])
            path.unlink()


if __name__ == "__main__":
    if SURVEY in sys.argv:
        survey(sys.argv[-1])
    else:
        sys.exit(baseline.main("data-speed", COLUMNS, measure))
