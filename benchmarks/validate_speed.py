"""`dpo validate` as a cold process, in turns with an empty Python and with `trl dpo --help`: wall time in seconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import machine_line

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
ROUNDS = 15
COMMANDS: dict[str, list[str]] = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "dpo validate configs/basic-dpo.json": [str(BIN / "dpo"), "validate", "configs/basic-dpo.json"],
    "dpo validate configs/quickstart.json": [str(BIN / "dpo"), "validate", "configs/quickstart.json"],
    "trl dpo --help": [str(BIN / "trl"), "dpo", "--help"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    for command in COMMANDS.values():
        seconds(command)  # once, so that bytecode is compiled and files are in the page cache
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(ROUNDS):
        for name, command in COMMANDS.items():
            if name != "trl dpo --help" or turn % 5 == 0:
                taken[name].append(seconds(command))
    print("| command | median s | least | most | runs |\n|---|---|---|---|---|")
    for name, times in taken.items():
        print(f"| `{name}` | {statistics.median(times):.2f} | {min(times):.2f} | {max(times):.2f} | {len(times)} |")
    print(f"\n{machine_line()}.")


if __name__ == "__main__":
    main()
