"""The live view of a training: progress, time left, each figure with its curve, memory, the last health event. No torch.

It gets the lines of metrics.jsonl as they are written. On a terminal it is redrawn four times a second; elsewhere
(a pipe, TERM=dumb) a line is printed now and then.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dpo_cli.results.summary import Event, Line
from dpo_cli.strategies.figures import DRAWN
from dpo_cli.ui.console import Console
from dpo_cli.ui.progress_view import bars, duration, long_work

# The figures that are shown, with their short names.
SHOWN = {**{figure.name: figure.short for figure in DRAWN if figure.short}, "tokens_per_second": "tok/s"}
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
WIDEST = 100  # columns of the view
NARROWEST = 3  # a curve with fewer columns is not readable
POINTS = 96  # kept per curve: up to twice as many for a moment
PIPED_LINES = 20  # progress lines of a run in a pipe
RECENT = 50  # lines that decide the pace
ACTIONS = {"note": "cyan", "warn": "yellow", "stop": "red"}


@dataclass(frozen=True)
class Side:
    """The figures of one split: their place in the view."""

    split: str
    head: str
    colour: str
    share: int  # of the columns for curves
    most: int  # maximum columns of a curve


SIDES = (Side("train", "train", "cyan", share=2, most=48), Side("eval", "held out", "magenta", share=1, most=16))


class Curve:
    """A figure over the whole run as a bounded number of means: neighbours are joined if there are too many."""

    def __init__(self) -> None:
        self.latest = math.nan
        self._sums: list[tuple[float, int]] = []  # sum and number of the finite values of each point
        self._seen, self._each = 0, 1  # values so far, and values per point

    def add(self, value: float) -> None:
        if self._seen % self._each == 0:
            self._sums.append((0.0, 0))
        if math.isfinite(value):
            total, count = self._sums[-1]
            self._sums[-1] = (total + value, count + 1)
        self.latest = value
        self._seen += 1
        if len(self._sums) == 2 * POINTS and self._seen % self._each == 0:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [(one[0] + other[0], one[1] + other[1]) for one, other in pairs]
            self._each *= 2

    @property
    def text(self) -> str:
        """The last value; empty before the first."""
        return _short(self.latest) if self._seen else ""

    @property
    def points(self) -> list[float]:
        """The means; NaN if no value is finite."""
        return [total / count if count else math.nan for total, count in self._sums]


def sparkline(values: Sequence[float], width: int, bars: str) -> str:
    """At most `width` characters that show the values; a blank for values that are not finite."""
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [_mean(values[start:end]) for start, end in pairwise(edges)]
    finite = [value for value in values if math.isfinite(value)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)

    def sign(value: float) -> str:
        return bars[round((value - low) / span * (len(bars) - 1)) if span else 0] if math.isfinite(value) else " "

    return "".join(map(sign, values))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


class Pace:
    """Seconds per step and per evaluation, from the lines, and the time left."""

    def __init__(self, now: float) -> None:
        self._step, self._time = 0, now  # of the last line
        self._trained, self._tokens = 0, 0.0  # step and tokens of the last training line
        self._recent: deque[tuple[int, float]] = deque(maxlen=RECENT)  # steps and their seconds
        self._evaluated, self._every, self._evaluation = 0, 0, 0.0  # step of the last one, steps between, seconds

    def see(self, line: Line, now: float) -> None:
        if line.split == "eval":
            training = (line.step - self._step) * self._step_seconds
            self._evaluation = max(0.0, now - self._time - training)
            self._evaluated, self._every = line.step, line.step - self._evaluated
        elif line.step > self._trained and line.figures.get("tokens_per_second"):  # without loading and evaluation
            seconds = (line.figures["tokens"] - self._tokens) / line.figures["tokens_per_second"]
            self._recent.append((line.step - self._trained, seconds))
            self._trained, self._tokens = line.step, line.figures["tokens"]
        self._step, self._time = line.step, now

    @property
    def _step_seconds(self) -> float:
        recent = tuple(self._recent)  # a copy: a thread of Rich draws the view while lines arrive
        return sum(seconds for _, seconds in recent) / (sum(steps for steps, _ in recent) or 1)

    def left(self, total: int, now: float) -> float | None:
        """Seconds until the last of `total` steps, including evaluations; None before the first step."""
        if not self._recent:
            return None
        evaluations = (total - self._evaluated) // self._every if self._every else 0
        at_last_line = (total - self._step) * self._step_seconds + evaluations * self._evaluation
        return max(0.0, at_last_line - (now - self._time))


class LiveView:
    """Within the context, the view of a training with `steps` steps and a memory bill of `predicted_gb`."""

    def __init__(
        self, console: Console, steps: int, predicted_gb: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console, self.steps, self.predicted_gb, self.clock = console, steps, predicted_gb, clock
        self.step, self.peak_gb = 0, 0.0
        self.event: Event | None = None
        self.curves = {side.split: {name: Curve() for name in SHOWN} for side in SIDES}
        self.pace = Pace(clock())
        self._reported = -1  # twentieths of the run that a line in the pipe reported
        self._ended = False
        self._shows_work = ExitStack()  # while it is open, the running work is shown here
        self._live = Live(self, console=console.out, refresh_per_second=4, vertical_overflow="crop")

    def __enter__(self) -> LiveView:
        if self.console.out.is_interactive:
            self._shows_work.enter_context(self.console.progress.left_to_another())
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended = True
        self._live.stop()
        self._shows_work.close()

    def recall(self, lines: Sequence[Line]) -> None:
        """The lines of the resumed training."""
        for line in lines:
            self._add(line)
            self._reported = max(self._reported, self._part(line))
            if line.split == "train":  # the lines do not have the time of an evaluation
                self.pace.see(line, self.clock())

    def show(self, line: Line) -> None:
        """A line of metrics.jsonl, as it is written."""
        self.pace.see(line, self.clock())
        self._add(line)
        if not self.console.out.is_interactive:
            self._tell(line)

    def _add(self, line: Line) -> None:
        for name in SHOWN.keys() & line.figures.keys():
            self.curves[line.split][name].add(line.figures[name])
        self.step, self.peak_gb = line.step, line.figures["peak_memory_gb"]

    def _part(self, line: Line) -> int:
        """The completed twentieths of the run."""
        return line.step * PIPED_LINES // self.steps

    def note(self, event: Event) -> None:
        """A health event: printed once, and kept in view until the next."""
        self.event = event
        self.console.line(event.text())

    def _tell(self, line: Line) -> None:
        """A line of text for an evaluation, and for each twentieth of the run."""
        part = self._part(line)
        if line.split == "eval" or part > self._reported:
            self._reported = max(part, self._reported)
            figures = "  ".join(
                f"{label} {_short(line.figures[name])}" for name, label in SHOWN.items() if name in line.figures
            )
            held_out = "held out: " if line.split == "eval" else ""
            self.console.line(f"step {line.step}/{self.steps}  {held_out}{figures}")

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(WIDEST, options.max_width)
        now = time.monotonic()
        work = [] if self._ended else long_work(now)
        yield self._progress(width, is_training=not work)
        yield from bars(work, now, width)
        if not self.step:
            return
        table = self._table(width, ASCII_BARS if options.ascii_only else BARS)
        event = [Text(self.event.text().partition("\n")[0], ACTIONS.get(self.event.action, ""))] if self.event else []
        for text in (*table, *event):
            text.no_wrap = True
            text.truncate(width, overflow="crop" if options.ascii_only else "ellipsis")
            yield text

    def _progress(self, width: int, is_training: bool) -> Table:
        seconds = self.pace.left(self.steps, self.clock())
        left = "preparing" if seconds is None else f"{duration(seconds)} left"
        left = left if is_training and not self._ended else ""
        done = f"{self.step}/{self.steps}"
        bar = ProgressBar(self.steps, self.step, width=max(1, width - len(done) - len(left) - 2))
        grid = Table.grid(padding=(0, 1))
        grid.add_row(Text(done), bar, Text(left, no_wrap=True))
        return grid

    def _table(self, width: int, bars: str) -> Iterator[Text]:
        """A line for each figure, and one for memory; the curves take the remaining columns."""
        shown = [name for name in SHOWN if any(curves[name].text for curves in self.curves.values())]
        sides = [side for side in SIDES if any(self.curves[side.split][name].text for name in shown)]
        labels = max(len(SHOWN[name]) for name in shown)
        values = [max(len(self.curves[side.split][name].text) for name in shown) for side in sides]
        room = width - labels - sum(values) - 3 * len(sides)
        shares = [room * side.share // sum(side.share for side in sides) for side in sides]
        widths = [
            min(share, side.most, self.steps) if share >= NARROWEST else 0 for share, side in zip(shares, sides, strict=True)
        ]
        if len(sides) > 1:
            heads = (f" {side.head:<{value + curve + 2}}" for side, value, curve in zip(sides, values, widths, strict=True))
            yield Text(" " * labels + "".join(heads))
        for name in shown:
            text = Text(f"{SHOWN[name]:<{labels}}")
            for side, value, curve in zip(sides, values, widths, strict=True):
                figure = self.curves[side.split][name]
                text.append(f" {figure.text:>{value}} ", "bold")
                text.append(f"{sparkline(figure.points, curve, bars) if curve else '':<{curve + 1}}", side.colour)
            yield text
        bill = f", bill {self.predicted_gb:.1f}" if self.predicted_gb is not None else ""
        yield Text(f"{'memory':<{labels}} {self.peak_gb:.1f} GB{bill}")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"
