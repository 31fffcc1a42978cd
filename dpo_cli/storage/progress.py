"""Progress of long work, announced as log records are: whoever works says what and how far, and a command may show it.

with working("scoring", len(rows), "pairs") as work:
    for batch in batches:
        ...
        work.add(len(batch))
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Work:
    """One piece of work. Its counts are changed by one thread, and read by the one that shows them."""

    what: str
    total: int | None  # None where it is not known
    unit: str = ""
    done: int = 0
    note: str = ""
    before: int = 0  # what an earlier process did
    start: float = field(default_factory=time.monotonic)

    def add(self, count: int = 1, note: str = "") -> None:
        self.done, self.note = self.done + count, note or self.note

    def rate(self, now: float) -> float:
        """Units a second, since the start."""
        return (self.done - self.before) / max(now - self.start, 1e-9)

    def left(self, now: float) -> float | None:
        """Seconds until the end at this rate; None where it is not known."""
        rate = self.rate(now)
        return (self.total - self.done) / rate if self.total is not None and rate else None


RUNNING: list[Work] = []  # what this process works on, the outermost first


@contextmanager
def working(what: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Work]:
    """Within, this work is running; `done` units of it were done by an earlier process."""
    work = Work(what, total, unit, done, before=done)
    RUNNING.append(work)
    try:
        yield work
    finally:
        RUNNING.remove(work)
