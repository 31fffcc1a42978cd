"""A `dpo` command in a process of its own: its peak memory is its own, and what it breaks ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from dpo_cli.errors import Exit

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = (Exit.SIGINT, Exit.SIGTERM)


def dpo(words: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document ({} without one) of a command; its messages go to this process's standard error.

    It is in a session of its own, so that Ctrl-C reaches it once: through this process, which passes on SIGINT and SIGTERM,
    waits for its end, and raises the interrupt then. If this process is killed, it ends too.
    """
    with passing_on() as passing:
        child = subprocess.Popen(
            command([*words, "--json"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        passing.child = child
        passing.send()
        printed, _ = child.communicate()
    if passing.received is not None or child.returncode in STOPPED:
        raise KeyboardInterrupt(128 + passing.received if passing.received is not None else child.returncode)
    try:
        document = json.loads(printed)
    except ValueError:  # it was killed, or ended before it could print
        document = {}
    return child.returncode, document if isinstance(document, dict) else {}


def command(words: Sequence[str]) -> list[str]:
    """The words that start a `dpo` command in a process which ends with this one."""
    begin = f"import sys; sys.path[:] = {sys.path!r}; from dpo_cli.storage.processes import end_with; end_with({os.getpid()})"
    run = f"sys.argv = {['dpo', *words]!r}; from dpo_cli.__main__ import main; main()"
    return [sys.executable, "-P", "-c", f"{begin}; {run}"]


@dataclass
class Passing:
    """Passes signals on to a process."""

    child: subprocess.Popen[bytes] | None = None
    received: int | None = None
    before: dict[signal.Signals, Any] = field(default_factory=dict)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.send()

    def send(self) -> None:
        if self.child is not None and self.received is not None:
            self.child.send_signal(self.received)


@contextmanager
def passing_on() -> Iterator[Passing]:
    """Within, SIGINT and SIGTERM go to the child."""
    passing = Passing()
    passing.before = {number: signal.signal(number, passing.note) for number in SIGNALS}
    try:
        yield passing
    finally:
        for number, handler in passing.before.items():
            signal.signal(number, handler)
