"""`dpo` commands in processes of their own: the peak memory of each is its own, and what it breaks ends with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any, Self

from dpo_cli.errors import Exit

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = (Exit.SIGINT, Exit.SIGTERM)
LOOK_SECONDS = 0.05  # between two looks at the processes


def dpo(words: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document ({} without one) of a command; its messages go to this process's standard error."""
    with Children() as children:
        child = children.start(words)
        while not children.ended():
            pass
        return child.result()


def command(words: Sequence[str]) -> list[str]:
    """The words that start a `dpo` command in a process which ends with this one."""
    begin = f"import sys; sys.path[:] = {sys.path!r}; from dpo_cli.storage.processes import end_with; end_with({os.getpid()})"
    run = f"sys.argv = {['dpo', *words]!r}; from dpo_cli.__main__ import main; main()"
    return [sys.executable, "-P", "-c", f"{begin}; {run}"]


@dataclass
class Child:
    """A command that runs, or has ended."""

    process: subprocess.Popen[bytes]
    printed: IO[bytes]  # a file: a pipe would be full while nobody reads it
    is_stopped: bool = False  # by `stop`

    def stop(self) -> None:
        """Ask it to end; a training saves a checkpoint first."""
        self.is_stopped = True
        self.process.send_signal(signal.SIGTERM)

    def result(self) -> tuple[int, dict[str, Any]]:
        """Exit code and JSON document, {} without one; after its end, and once."""
        with self.printed:
            self.printed.seek(0)
            try:
                document = json.loads(self.printed.read())
            except ValueError:  # it was killed, or ended before it could print
                document = {}
        return self.process.returncode, document if isinstance(document, dict) else {}


class Children:
    """Commands that run at the same time as this process, within a context.

    Each is in a session of its own, so that Ctrl-C reaches it once: through this process, which passes on SIGINT and SIGTERM,
    waits for the end of all, and raises the interrupt then. If this process is killed, they end too.
    """

    def __init__(self) -> None:
        self._running: list[Child] = []
        self._received: int | None = None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop_all(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, words: Sequence[str], variables: Mapping[str, str] | None = None, log: Path | None = None) -> Child:
        """Start `dpo` with these words. `variables` are added to the environment; messages go to the file `log`, if given."""
        printed = tempfile.TemporaryFile()  # noqa: SIM115
        errors = log.open("ab") if log is not None else None
        child = Child(
            subprocess.Popen(
                command([*words, "--json"]),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                env={**os.environ, **(variables or {})},
                start_new_session=True,
            ),
            printed,
        )
        if errors is not None:
            errors.close()
        self._running.append(child)
        if self._received is not None:  # while it was started
            child.process.send_signal(self._received)
        return child

    def ended(self, seconds: float = 1.0) -> list[Child]:
        """Those that have ended since the last call, at the latest after `seconds`.

        After a signal to this process, or to one of them, all end, and this raises the interrupt with its exit code.
        """
        until = time.monotonic() + seconds
        while True:
            done = [child for child in self._running if child.process.poll() is not None]
            self._running = [child for child in self._running if child not in done]
            own = [child.process.returncode for child in done if not child.is_stopped and child.process.returncode in STOPPED]
            if self._received is not None or own:
                code = 128 + self._received if self._received is not None else own[0]
                self._stop_all(code - 128)
                raise KeyboardInterrupt(code)
            if done or time.monotonic() >= until:
                return done
            time.sleep(LOOK_SECONDS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        for child in self._running:
            child.process.send_signal(number)

    def _stop_all(self, number: int) -> None:
        """Send a signal to those that have not got one, and wait until all have ended."""
        for child in self._running:
            if self._received is None:
                child.process.send_signal(number)
        for child in self._running:
            child.process.wait()
        self._running = []
