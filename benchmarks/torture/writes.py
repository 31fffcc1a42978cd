"""Every write boundary of a run, failed once: with a full disk, with a bad one, and with the end of the process."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import Bench, Outcome, train
from forks import Child, each
from gate import Call, counted, takes_room, watched

from dpo_cli.storage.run_directory import RunDirectory

KILLED, NEVER = 0, 10**9
MESSAGES = (1, 3)  # exit codes that come with a message


@dataclass(frozen=True)
class Way:
    """What is done at a boundary, to which run: a new one, or the words of one in a directory where there is one already."""

    check: str
    number: int
    words: tuple[str, ...] = ()
    found: str = ""
    every: int = 1


WAYS = (
    Way("ENOSPC from the Nth write boundary on, for every N; then --resume", errno.ENOSPC),
    Way("EIO at the Nth write boundary, for every N; then --resume", errno.EIO),
    Way("SIGKILL at the Nth write boundary, for every N; then --resume", KILLED),
    Way(
        "the same of a run that replaces a finished one (--overwrite), every third N",
        KILLED,
        ("--overwrite",),
        "alone/short",
        3,
    ),
    Way("the same of a run that goes on (--resume), every third N", KILLED, ("--resume",), "interrupted", 3),
)


class Failing:
    """Lets N - 1 calls pass, and fails the Nth; where the disk is full, also those that need room after it."""

    def __init__(self, run: Path, nth: int, number: int) -> None:
        self.run, self.nth, self.number = run, nth, number
        self.seen = 0
        self.hit: Call | None = None
        self.kept = 0  # the step of the newest checkpoint when it failed

    def __call__(self, call: Call) -> int | None:
        if not counted(call, self.number):
            return None
        self.seen += 1
        if self.seen == self.nth:
            self.hit, self.kept = call, newest(self.run)
            return self.number
        is_full = self.number == errno.ENOSPC and self.seen > self.nth and takes_room(call)
        return self.number if is_full else None


def newest(run: Path) -> int:
    """The step of the newest checkpoint that is whole; 0 where there is none."""
    return next((made.step for made in RunDirectory(run).checkpoints.verified(lambda *_: None)), 0)


def writes(bench: Bench, way: Way, first: int = 1, every: int | None = None) -> Outcome:
    """One run for each boundary, or for some of them."""
    done = Outcome(way.check)
    counting = _run(bench, way, _place(bench, way, NEVER), NEVER)[0]
    for fault, is_hit in each(partial(_failed, bench, way), range(first, counting.seen + 1, every or way.every)):
        if is_hit or fault:
            done.add(fault)
    done.counts = {"boundaries": counting.seen}
    return done


def interrupt(bench: Bench) -> None:
    """Leave the run that `WAYS` calls interrupted: killed when its second checkpoint was there."""

    def kill(call: Call) -> int | None:
        return KILLED if (run / "checkpoints" / "step-2").exists() else None

    run = bench.place / "interrupted"
    watched(lambda arm: train(bench.place / "short.json", run, before=arm), run, kill)


def _place(bench: Bench, way: Way, nth: int) -> Path:
    return bench.place / "-".join(("boundary", errno.errorcode.get(way.number, "killed"), *way.words, str(nth)))


def _run(bench: Bench, way: Way, run: Path, nth: int) -> tuple[Failing, Child, int]:
    failing = Failing(run, nth, way.number)
    if way.found:
        shutil.copytree(bench.place / way.found, run)
    child, code = watched(lambda arm: train(bench.place / "short.json", run, *way.words, before=arm), run, failing)
    return failing, child, code


def _failed(bench: Bench, way: Way, nth: int) -> tuple[str | None, bool]:
    """What is wrong with a run whose `nth` boundary failed in this way, and whether it has so many."""
    run = _place(bench, way, nth)
    failing, child, code = _run(bench, way, run, nth)
    if failing.hit is None:
        return (f"let alone, it ended with {code}" if code else bench.other("short", run)), False
    where = f"{run} at {failing.hit.name} of {failing.hit.path.relative_to(run)}"
    if way.number != KILLED and (fault := _badly_told(bench, run, code, child.said())):
        return f"{where}: {fault}", True
    if "--overwrite" not in way.words and newest(run) < failing.kept:
        return f"{where}: the checkpoint of step {failing.kept} is lost", True
    fault = bench.torn(run) or bench.goes_on("short", run)
    return (f"{where}: {fault}" if fault else None), True


def _badly_told(bench: Bench, run: Path, code: int, said: str) -> str | None:
    """A run that a write failed has to end with a message that says so, or to leave what it should in spite of that."""
    if "Traceback" in said or "Logging error" in said:
        return f"a traceback, exit {code}: {said[-3000:]}"
    if code == 0:
        return bench.other("short", run)
    return None if code in MESSAGES and "error" in said.lower() else f"exit {code}: {said[-1000:]}"
