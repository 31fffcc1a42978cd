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
    counted: float = 0.0  # when `done` was changed

    def add(self, count: int = 1, note: str = "", now: float | None = None) -> None:
        self.counted = time.monotonic() if now is None else now
        self.done, self.note = self.done + count, note or self.note

    @property
    def rate(self) -> float:
        """Units a second, from the start to the last count; 0 before the first."""
        return (self.done - self.before) / max(self.counted - self.start, 1e-9)

    def left(self, now: float) -> float | None:
        """Seconds until the end at this rate; None where it is not known, or where they are over before the work is."""
        if self.total is None or self.rate <= 0:
            return None
        left = (self.total - self.done) / self.rate - (now - self.counted)
        return max(0.0, left) if left > 0 or self.done >= self.total else None


GAP = 0.5  # seconds without work that do not end a time of work
RUNNING: list[Work] = []  # what this process works on, the outermost first
_TIMES = {"start": 0.0, "end": 0.0}  # when this time of work began, and when the last work ended


@contextmanager
def working(what: str, total: int | None = None, unit: str = "", done: int = 0) -> Iterator[Work]:
    """Within, this work is running; `done` units of it were done by an earlier process."""
    work = Work(what, total, unit, done, before=done)
    if not RUNNING and work.start - _TIMES["end"] > GAP:
        _TIMES["start"] = work.start
    RUNNING.append(work)
    try:
        yield work
    finally:
        RUNNING.remove(work)
        _TIMES["end"] = time.monotonic()


def busy_since() -> float:
    """When this time of work began: a chain of short works is as long as one long work."""
    return _TIMES["start"]
