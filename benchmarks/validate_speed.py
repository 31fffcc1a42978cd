"""`dpo validate` as a cold process, in turns with an empty Python and with `trl dpo --help`: wall time in seconds."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import baseline
from baseline import EXACT, Column, Table

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ROUNDS = 15
ONE = "dpo validate configs/basic-dpo.json"  # to which the others are compared
TRL = "trl dpo --help"
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    ONE: [str(BIN / "dpo"), "validate", "configs/basic-dpo.json"],
    "dpo validate configs/quickstart.json": [str(BIN / "dpo"), "validate", "configs/quickstart.json"],
    TRL: [str(BIN / "trl"), "dpo", "--help"],
}
COLUMNS = (
    Column("command", shown="`{}`"),
    Column("median s", "s", "{:.2f}"),
    Column("least", "s", "{:.2f}"),
    Column("most", "s", "{:.2f}"),
    Column("ratio", "of the first `dpo validate`", "{:.2f}", (0.4, 0.05)),
    Column("runs", "runs", tolerance=EXACT),
)


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(table: Table, options: argparse.Namespace) -> None:
    commands = {name: command for name, command in COMMANDS.items() if not options.small or name != TRL}
    for command in commands.values():
        seconds(command)  # once, so that bytecode is compiled and files are in the page cache
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(2 if options.small else ROUNDS):
        for name, command in commands.items():
            if name != TRL or turn % 5 == 0:
                taken[name].append(seconds(command))
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, times in taken.items():
        table.add(name, medians[name], min(times), max(times), medians[name] / medians[ONE], len(times))


if __name__ == "__main__":
    sys.exit(baseline.main("validate-speed", COLUMNS, measure))
