"""`dpo train` in several processes of this machine. No torch: the processes import it, and this one waits.

The first process has the terminal. The others print only what ends them. Signals reach the first one, which stops all with a
checkpoint; if this process is killed, they end too.
"""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dpo_cli.commands.own_process import SIGNALS, command
from dpo_cli.config.config import ConfigLike, load_stages
from dpo_cli.errors import Exit, RunFailed, UsageError
from dpo_cli.hardware.machine import probe
from dpo_cli.storage.processes import cores
from dpo_cli.storage.world import AUTO, LOST_FIX, STORE, Place
from dpo_cli.ui.console import Console

POLL_SECONDS = 0.1
GRACE_SECONDS, OTHERS_SECONDS = 60.0, 2.0  # after the end of one process: for the first one, and for others after its end


def processes_of(config: ConfigLike, overrides: Sequence[str]) -> int:
    """The number of processes that a config asks for; 1 for a process that a launcher has started, or a faulty config.

    `UsageError` if its stages differ.
    """
    if Place.of(os.environ) is not None:
        return 1
    if config == "-":  # it is read again
        sys.stdin = io.TextIOWrapper(io.BytesIO(sys.stdin.buffer.read()))
    configs = [loaded.config for loaded in load_stages(config, overrides) if loaded.config is not None]
    if config == "-":
        sys.stdin.seek(0)
    asked = {each.num_processes for each in configs}
    if len(asked) > 1:
        raise UsageError("the stages ask for different numbers of processes", "give num_processes once, or use --processes N")
    count = asked.pop() if asked else 1
    if count == 1:
        return 1
    gpus = len(probe().gpus)
    if count == AUTO:
        return max(1, gpus)
    if 0 < gpus < int(count) and any(each.device != "cpu" for each in configs):
        raise UsageError(
            f"{count} processes need as many GPUs, and there are {gpus}", f"write --processes {gpus}, or device=cpu"
        )
    return int(count)


def train_in_processes(words: Sequence[str], count: int, console: Console) -> Exit:
    """Run a `dpo` command as `count` processes that share it, and wait for their end: the exit code."""
    if sys.platform == "win32":  # the socket of the first process cannot be passed on
        raise UsageError("--processes needs Linux or macOS", "start with torchrun: see docs/guides/cluster.md")
    given = sys.stdin.buffer.read() if "-" in words else b""
    with socket.socket() as store, _passed_on() as passing:
        store.bind(("127.0.0.1", 0))
        store.listen()
        place = store.getsockname()
        children: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                children.append(_started(words, rank, count, place, store if rank == 0 else None))
                if rank == 0:
                    passing.child = children[0]
                    passing.send()
                    store.close()  # so that its end is seen by those that ask it
            for child in children:
                assert child.stdin is not None
                child.stdin.write(given)
                child.stdin.close()
            codes = _ended(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
    return _code(codes, passing.received, console)


@dataclass
class _Passing:
    """Passes signals on to a process."""

    child: subprocess.Popen[bytes] | None = None
    received: int | None = None

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self.send()

    def send(self) -> None:
        if self.child is not None and self.received is not None:
            self.child.send_signal(self.received)


@contextmanager
def _passed_on() -> Iterator[_Passing]:
    """Within, SIGINT and SIGTERM go to the child: a second one too, which ends it at once."""
    passing = _Passing()
    before = {number: signal.signal(number, passing.note) for number in SIGNALS}
    try:
        yield passing
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _started(
    words: Sequence[str], rank: int, count: int, place: tuple[str, int], store: socket.socket | None
) -> subprocess.Popen[bytes]:
    """A process in a session of its own, so that Ctrl-C reaches it once: through this process. The first one serves `store`."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": place[0],
        "MASTER_PORT": str(place[1]),
        STORE: str(store.fileno()) if store is not None else "",
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))  # all would use every core
    return subprocess.Popen(
        command(words),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(store.fileno(),) if store is not None else (),
    )


def _ended(children: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes of all. When one has failed, the others get a while to end as well; None for one that does not."""
    deadline: float | None = None
    while True:
        codes = [child.poll() for child in children]
        if all(code is not None for code in codes) or (deadline is not None and time.monotonic() > deadline):
            return codes
        if deadline is None and (any(codes) or codes[0] is not None):
            # The first one may still save a checkpoint, and write what ended; the others have nothing to do without it.
            deadline = time.monotonic() + (GRACE_SECONDS if codes[0] is None else OTHERS_SECONDS)
        time.sleep(POLL_SECONDS)


def _code(codes: Sequence[int | None], received: int | None, console: Console) -> Exit:
    """The exit code of all: that of the first process, if it has ended by itself. What was killed is named."""
    if received is not None and codes[0] in (-received, 128 + received):
        return Exit(128 + received)
    killed = [rank for rank, code in enumerate(codes) if code is not None and code < 0]
    for rank in killed:
        name = signal.Signals(-int(codes[rank] or 0)).name
        console.error(RunFailed(f"process {rank + 1} of {len(codes)} was killed ({name})", LOST_FIX))
    if codes[0] in list(Exit) and codes[0] != Exit.FAILED:
        return Exit(codes[0]) if codes[0] or not killed else Exit.FAILED
    known = [Exit(code) for code in codes if code in list(Exit)]
    return next((code for code in known if code not in (Exit.DONE, Exit.FAILED)), Exit.FAILED)
