"""Every write boundary of a run, failed once: with a full disk, with a bad one, and with the end of the process."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

from forks import AT_ONCE, each
from gate import Call, counted, takes_room, watched
from runs import Bench, Outcome, train

from dpo_cli.runs.directory import RunDirectory

KILLED = 0
WAYS = {
    errno.ENOSPC: "ENOSPC from the Nth write boundary on, for every N; then --resume",
    errno.EIO: "EIO at the Nth write boundary, for every N; then --resume",
    KILLED: "SIGKILL at the Nth write boundary, for every N; then --resume",
}
MESSAGES = (1, 3)  # exit codes that come with a message


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


def writes(bench: Bench, number: int, every: int = 1, first: int = 1) -> Outcome:
    """One run for each `every`th boundary, until a run passes without being hit."""
    done = Outcome(WAYS[number])
    nth, whole = first, False
    while not whole:
        cases = range(nth, nth + 8 * AT_ONCE * every, every)
        for fault, is_hit in each(partial(_failed, bench, number), cases):
            whole = whole or not is_hit
            if is_hit or fault:
                done.add(fault)
        nth = cases.stop
    return done


def _failed(bench: Bench, number: int, nth: int) -> tuple[str | None, bool]:
    """What is wrong with a run whose `nth` boundary failed with this errno, and whether it has so many."""
    run = bench.place / f"{errno.errorcode.get(number, 'killed')}-{nth}"
    failing = Failing(run, nth, number)
    child, code = watched(lambda arm: train(bench.place / "short.json", run, before=arm), run, failing)
    if failing.hit is None:
        return (f"let alone, it ended with {code}" if code else bench.other("short", run)), False
    where = f"{run} at {failing.hit.name} of {failing.hit.path.relative_to(run)}"
    if number != KILLED and (fault := _badly_told(bench, run, code, child.said())):
        return f"{where}: {fault}", True
    if newest(run) < failing.kept:
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
