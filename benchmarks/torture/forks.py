"""Tries that cost no import: a process that has loaded everything forks a child for each, and sees how it ends."""

from __future__ import annotations

import multiprocessing
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fork_server import reseed

AT_ONCE = 2
SECONDS = 120  # after which a child hangs, and the torture with it
UNEXPECTED = 70  # exit code of a child whose work raised what nobody caught
Case, Result = TypeVar("Case"), TypeVar("Result")


@dataclass
class Child:
    """A forked process; what it prints goes to `log`."""

    pid: int
    log: Path
    started: float
    code: int | None = None

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Its exit code, as a shell has it: 128 and the number of the signal that ended it. None while it runs on."""
        if self.code is not None:
            return self.code
        watched = os.pidfd_open(self.pid)
        try:
            if not select.select([watched], [], [], max(seconds, 0))[0]:
                return None
        finally:
            os.close(watched)
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.code = code if code >= 0 else 128 - code
        return self.code

    def wait_until(self, seconds: float) -> int | None:
        """The same, at this many seconds after its start."""
        return self.wait(self.started + seconds - time.monotonic())

    def end(self) -> int:
        """Its exit code, which is awaited."""
        code = self.wait()
        if code is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"a child runs for more than {SECONDS} seconds: {self.said()}")
        return code

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> int:
        self.send(signal.SIGKILL)
        return self.end()

    def said(self) -> str:
        if not self.log.exists():  # it was stopped before its first line
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")


def start(work: Callable[[], object], log: Path) -> Child:
    """A child that does `work`, which may end it with `sys.exit`."""
    started = time.monotonic()
    if pid := os.fork():
        return Child(pid, log, started)
    code = UNEXPECTED
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
        reseed()
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the child must not go on as a second copy of its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def each(work: Callable[[Case], Result], cases: Iterable[Case], at_once: int = AT_ONCE) -> list[Result]:
    """`work` done on each case, a few at once, each in a process that may fork: one with threads should not."""
    with multiprocessing.get_context("fork").Pool(at_once) as pool:
        return pool.map(work, cases, chunksize=1)
