"""`make torture`: what a run survives, as one table. With --small a few tries of each."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before torch is there
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / name) for name in ("", "benchmarks/torture", "benchmarks", "tests")]

import baseline  # noqa: E402
from baseline import Column, Table  # noqa: E402
from bench import EXTRA, SHAPES, Bench, Outcome  # noqa: E402
from damage import detection, falling_back  # noqa: E402
from disk import can_mount, full_disks  # noqa: E402
from gate import is_possible  # noqa: E402
from kills import kills, whole_kills  # noqa: E402
from ranks import rank_kills  # noqa: E402
from signals import signals  # noqa: E402
from starts import starts  # noqa: E402
from writes import WAYS, interrupt, writes  # noqa: E402

FEW = ("evaluations", "early stopping")  # shapes, of the short torture
SHOWN = 10  # faults, in full
TRIES = (0.25, 2.0)  # what a moment falls into is chance, and the boundaries are as many as the code has
COLUMNS = (
    Column("check"),
    Column("tries", "tries", "{:,}", TRIES),
    Column("passed", "tries", "{:,}", TRIES),
    Column("of", "count"),
)


def parts(bench: Bench, is_short: bool) -> Iterator[Callable[[], Outcome]]:
    """The lines of the table, in their order."""

    def many(short: int, whole: int) -> int:
        return short if is_short else whole

    yield lambda: kills(bench, many(1, 200), FEW if is_short else tuple(SHAPES))
    if not is_short:
        yield lambda: whole_kills(bench, 8)
    yield lambda: rank_kills(bench, many(2, 50))
    yield lambda: detection(bench, 500)
    yield lambda: falling_back(bench, many(2, 20))
    if is_possible():
        interrupt(bench)
        for way in WAYS:
            yield partial(writes, bench, way, first=many(40, 1), every=400 if is_short else None)
    yield lambda: starts(bench, many(1, 20))
    if can_mount(bench.place):
        yield lambda: full_disks(bench, many(1, 20))
    yield lambda: signals(bench, many(2, 20))


def measure(table: Table, options: argparse.Namespace) -> int:
    faults = []
    with tempfile.TemporaryDirectory() as place:
        bench = Bench.make(Path(place))
        for name in (*EXTRA, *(FEW if options.small else SHAPES)):
            bench.know(name)
        for part in parts(bench, options.small):
            done: Outcome = part()
            table.add(done.check, done.tries, done.tries - len(done.faults), done.counts or None)
            faults += done.faults
        if not is_possible():
            table.note("No write was failed: that needs Linux 5.5 on x86_64, and seccomp.")
        if not can_mount(bench.place):
            table.note("No disk was filled: that needs the right to mount (`unshare -rm make torture`).")
    print("\n\n".join(faults[:SHOWN]), end="", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(baseline.main("torture", COLUMNS, measure))
