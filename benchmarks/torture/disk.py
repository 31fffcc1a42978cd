"""Disks that are full: small ones in memory, which need the right to mount."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from bench import Bench, Outcome, train
from forks import each
from writes import newest

from dpo_cli.errors import Exit
from dpo_cli.storage.atomic import free_bytes

MEGABYTES = 128
BEFORE = (Exit.FAILED, Exit.INVALID, Exit.UNFIT)  # how a run ends for which there is no room


def can_mount(place: Path) -> bool:
    try:
        with disk(place / "mount"):
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def disk(place: Path) -> Iterator[None]:
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "torture", place], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        place.rmdir()


def full_disks(bench: Bench, count: int, seed: int = 0) -> Outcome:
    """Runs whose disk someone else fills at a random moment, all but for random room, so that they come upon its end later."""
    done = Outcome(f"a disk of {MEGABYTES} MB that fills up; then room is made, and --resume")
    number = 0
    while done.tries < count:
        cases = [(seed, number + i) for i in range(max(2, count - done.tries))]
        number += len(cases)
        for fault, was_full in each(partial(_filled, bench), cases):
            if was_full or fault:
                done.add(fault)
    return done


def _filled(bench: Bench, case: tuple[int, int]) -> tuple[str | None, bool]:
    """What is wrong with a run on a disk that fills up, and whether the run met its end."""
    seed, number = case
    draw = random.Random(f"disk {seed} {number}")
    place = bench.place / f"disk-{number}"
    with disk(place):
        run, filler = place / "run", place / "filler"
        child = train(bench.place / "short.json", run)
        if child.wait_until(draw.uniform(0, bench.seconds["short"])) is None:
            fill(filler, draw.randrange(_needed(bench)))
        code, said = child.end(), child.said()
        if code == Exit.DONE:
            return bench.other("short", run), False
        if code not in BEFORE or "Traceback" in said or "free" not in said.lower():
            return f"{run}: exit {code}: {said[-3000:]}", True
        kept = newest(run) if run.exists() else 0
        filler.unlink()
        fault = (bench.torn(run) if run.exists() else None) or bench.goes_on("short", run)
        says = f"step-{kept} is kept" in " ".join(said.split())
        return fault or (None if says or not kept else f"{run}: step-{kept} was kept, and not named: {said}"), True


def _needed(bench: Bench) -> int:
    """Bytes that a run has on its disk at the most, about: what it leaves, and one more checkpoint."""
    run = bench.place / "alone" / "short"
    return sum(path.stat().st_blocks * 512 for path in run.rglob("*")) * 4 // 3


def fill(filler: Path, room: int) -> None:
    """Take all of a disk but some room, while a run may be writing to it."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):  # full is full, whoever was faster
        while (size := free_bytes(filler) - room) > 0:
            file.write(bytes(min(size, 1 << 20)))
