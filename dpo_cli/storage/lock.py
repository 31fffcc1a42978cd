"""One process at a time: a lock that the kernel releases when its holder ends for any reason."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from dpo_cli.errors import invalid

FAR = 1 << 30  # a byte beyond any lock file: Windows does not let others read locked bytes


def is_locked_now(file: IO[str] | IO[bytes]) -> bool:
    """Lock an open file, until it is closed; False where another process has it."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        file.seek(0)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path` within the context; `InvalidInput` names its current holder.

    The file stays: removing the name of a held lock would let two processes hold it.
    """
    with path.open("a+", encoding="utf-8") as file:
        if not is_locked_now(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            message = f"{path.parent} is in use by {holder}"
            fix = "wait for it, stop it, or choose another output_dir"
            raise invalid("run-locked", message, fix, "output_dir")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
        file.flush()
        yield
