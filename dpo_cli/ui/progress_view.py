"""What a command works on, once it takes longer than two seconds: a bar on a terminal, a line now and then in a pipe. No torch.

A thread of its own looks at the running work (storage/progress.py), so that work that cannot count is shown too.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import IO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_cli.storage.progress import RUNNING, Work, busy_since
from dpo_cli.storage.redaction import redact

PATIENCE = 2.0  # seconds before work is shown
BETWEEN_LINES = 10.0  # seconds between two lines in a pipe
LOOKS = 0.2  # seconds between two looks at the running work
WIDEST = 100  # columns
ELLIPSIS, LEAST_KEPT = "...", 16  # in place of the middle of a long path; characters of it that are kept at least
ECHO = 3  # columns that stay free, for the ^C of a terminal


class ProgressView:
    """Within the context, running work is shown on the console `out`; not while another view does (`left_to_another`)."""

    def __init__(self, out: Callable[[], RichConsole]) -> None:
        self._out = out
        self._end = threading.Event()
        self._lock = threading.Lock()  # held while a live display is started or stopped
        self._left = 0  # how many others show the work, or write to the terminal, now
        self._live: Live | None = None
        self._last_line = 0.0
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> ProgressView:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        with self._lock:
            self._hide()

    @contextmanager
    def left_to_another(self) -> Iterator[None]:
        """Within, the terminal is another's: of a view that shows the running work too, or of an error."""
        with self._lock:
            self._left += 1
            self._hide()
        try:
            yield
        finally:
            with self._lock:
                self._left -= 1

    def _watch(self) -> None:
        while not self._end.wait(LOOKS):
            now = time.monotonic()
            work = long_work(now)
            if not self._out().is_interactive:
                if work and now - self._last_line >= BETWEEN_LINES:
                    self._last_line = now
                    if _nobody_reads(self._out().file):
                        return  # the command itself finds out with its next line, and ends
                    self._out().print(Text(": ".join([*(redact(one.what) for one in work[:-1]), line(work[-1], now)])))
                continue
            with self._lock:
                if not work or self._left:
                    self._hide()
                elif self._live is None:
                    self._live = self._made()
                    self._live.start()

    def _made(self) -> Live:
        """A live display; the streams of the process stay with the thread of the command."""
        return Live(
            self, console=self._out(), refresh_per_second=4, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def _hide(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        now = time.monotonic()
        yield from bars(long_work(now), now, min(WIDEST, options.max_width - ECHO))


def _nobody_reads(file: IO[str]) -> bool:
    """Whether the other end of a pipe is closed."""
    try:
        poll = select.poll()
        poll.register(file.fileno(), 0)
    except (AttributeError, OSError):  # Windows has no poll; a file in memory has no number
        return False
    return any(event & (select.POLLERR | select.POLLNVAL) for _, event in poll.poll(0))


def long_work(now: float) -> list[Work]:
    """The running work, if this process works for some time; the innermost is last."""
    running = list(RUNNING)
    return running if running and now - busy_since() >= PATIENCE else []


def line(work: Work, now: float) -> str:
    """What, how far, how fast, and the time left or the time since the start."""
    parts = [redact(work.what) + (f" {work.done:,} of {work.total:,} {work.unit}".rstrip() if work.total is not None else "")]
    if work.total is None and work.done:
        parts[0] += f" {work.done:,} {work.unit}".rstrip()
    if rate := work.rate:
        parts.append(f"{rate:,.1f} {work.unit}/s" if rate < 10 else f"{rate:,.0f} {work.unit}/s")
    left = work.left(now)
    parts.append(f"{duration(now - work.start)} so far" if left is None else f"{duration(left)} left")
    return ", ".join(filter(None, [*parts, work.note]))


def _line_within(width: int, work: Work, now: float) -> str:
    """The line; where it is too wide, without the middle of its first words (a long path), so that the counts are seen."""
    text, what = line(work, now), redact(work.what)
    kept = len(what) - (len(text) - width) - len(ELLIPSIS)
    if len(text) <= width or kept < LEAST_KEPT:
        return text
    return line(replace(work, what=f"{what[: kept // 2]}{ELLIPSIS}{what[len(what) - (kept - kept // 2) :]}"), now)


def bars(works: list[Work], now: float, width: int) -> Iterator[Table]:
    """A line for each work, with a bar where there is room; one of unknown length has a moving bar."""
    for work in works:
        text = Text(_line_within(width, work, now), no_wrap=True, overflow="ellipsis")
        room = width - len(text) - 1
        grid = Table.grid(padding=(0, 1))
        if room < 8:
            text.truncate(width, overflow="ellipsis")
            grid.add_row(text)
        else:
            grid.add_row(text, ProgressBar(work.total, work.done, width=room, pulse=work.total is None, animation_time=now))
        yield grid


def duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"
