"""Files that are read once while they stay as they are: several checks of one command ask the same headers."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Read = TypeVar("Read")
KEPT = 256  # files of each kind
YOUNG_NS = 2_000_000_000  # a file system may give two changes within two seconds the same time


def once_per_file(read: Callable[[Path], Read]) -> Callable[[Path], Read]:
    """`read`, which is called again only for a file that was changed. What it returns is shared: nobody changes it."""
    kept: dict[tuple[int, ...], Read] = {}

    @functools.wraps(read)
    def of(path: Path) -> Read:
        stat = path.stat()
        if time.time_ns() - stat.st_ctime_ns < YOUNG_NS:
            return read(path)
        # Of the two times of change a program can set the one, as rsync and cp -p do, and not the other.
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if state not in kept:
            if len(kept) == KEPT:
                del kept[next(iter(kept))]
            kept[state] = read(path)
        return kept[state]

    return of
