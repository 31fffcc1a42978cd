"""One process at a time: a lock that the kernel lets go of when its holder ends, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from dpo_cli.errors import InvalidInput, Problem


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock at `path` while the context lasts; `InvalidInput` names who holds it already.

    The file stays: taking away the name of a held lock would let two hold it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            message = f"{path.parent} is in use by {holder}"
            fix = "wait for it, stop it, or choose another output_dir"
            raise InvalidInput([Problem("error", "run-locked", message, fix, "output_dir")]) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
        file.flush()
        yield
