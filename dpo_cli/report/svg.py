"""Curves, histograms and intervals as coordinates, which the templates of a report draw as SVG. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

Point = tuple[float, float | None]  # a step and its value; None where that was not finite


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


WIDTH, HEIGHT = 360, 200  # of a plot, in the units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 12, 24  # around the area that is drawn on
MOST_POINTS = 240  # of a drawn curve: about one for each pixel that it has
DIGITS = 3  # of a value that is read off a curve


@dataclass(frozen=True)
class Axis:
    """A range of values along so many units, with a mark at each multiple of a round number."""

    low: float
    high: float
    start: float  # where `low` lies, and `end` where `high` does
    end: float
    marks: Sequence[float]

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def labelled(self) -> Iterator[tuple[float, str]]:
        """The place and the text of each mark."""
        step = self.marks[1] - self.marks[0] if len(self.marks) > 1 else self.marks[0]
        return ((self.at(mark), mark_text(mark, step)) for mark in self.marks)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps, of the training or of the held-out rows. `colour` is the number of its colour."""

    name: str
    split: str  # train, eval
    points: Sequence[Point]
    colour: int = 0

    @property
    def label(self) -> str:
        words = [self.name, {"train": "train", "eval": "held out"}[self.split]]
        return ", ".join(word for word in words if word)

    @property
    def is_dense(self) -> bool:
        """Whether the curve is more of an area."""
        return len(self.points) > MOST_POINTS // 2

    @property
    def last(self) -> float | None:
        return self.points[-1][1] if self.points else None


@dataclass(frozen=True)
class Plot:
    """Curves of one quantity over one axis. A `level` is a value worth comparing with, and its name."""

    title: str
    note: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = ()
    end: float = 0  # the last step of all plots beside it
    from_zero: bool = False  # of a distance or a size, whose zero means something

    width, height, left, right, top, bottom = WIDTH, HEIGHT, LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM

    @cached_property
    def drawn(self) -> list[Curve]:
        return [Curve(curve.name, curve.split, thinned(curve.points), curve.colour) for curve in self.curves if curve.points]

    @property
    def named(self) -> dict[str, list[Curve]]:
        """The curves of each name."""
        names = dict.fromkeys(curve.name for curve in self.drawn)
        return {name: [curve for curve in self.drawn if curve.name == name] for name in names}

    @cached_property
    def x(self) -> Axis:
        steps = [step for curve in self.drawn for step, _ in curve.points]
        high = max(*steps, self.end, 1)
        marks = [mark for mark in ticks(0, high, 5) if mark <= high and mark == int(mark)]
        return Axis(0, high, self.left, self.right, marks)

    @cached_property
    def y(self) -> Axis:
        values = [value for curve in self.drawn for _, value in curve.points if value is not None]
        values += [level for level, _ in self.levels] + [0.0] * self.from_zero
        marks = ticks(min(values, default=0.0), max(values, default=1.0))
        return Axis(marks[0], marks[-1], self.bottom, self.top, marks)

    def path(self, curve: Curve) -> str:
        """The curve as SVG's `d`; it is interrupted where a value was not finite."""
        parts, pen = [], "M"
        for step, value in curve.points:
            if value is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x.at(step):g} {self.y.at(value):g}")
            pen = "L"
        return "".join(parts)

    def dots(self, curve: Curve) -> list[tuple[float, float]]:
        """Where the measured values of a curve lie; of a curve with many there are none to see."""
        if (curve.split == "train" and len(curve.points) > 1) or len(curve.points) > MOST_POINTS // 4:
            return []
        return [(self.x.at(step), self.y.at(value)) for step, value in curve.points if value is not None]

    @property
    def broken(self) -> list[float]:
        """Where values were not finite."""
        return sorted({self.x.at(step) for curve in self.drawn for step, value in curve.points if value is None})

    @property
    def data(self) -> list[list[list[float | None]]]:
        """What is read off under the pointer: of each curve its steps and its values."""
        return [[[step for step, _ in curve.points], [rounded(value) for _, value in curve.points]] for curve in self.drawn]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most so many points: the least and the greatest of each stretch, so that no spike is lost, and both ends.

    Of a stretch that holds a value which is not finite, its first is kept instead of the greatest.
    """
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        finite = [(value, i) for i in part if (value := points[i][1]) is not None]
        broken = next((i for i in part if points[i][1] is None), None)
        kept |= {min(finite)[1]} if finite else set()
        kept |= {broken} if broken is not None else {max(finite)[1]}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that span low to high, in at most so many stretches and one."""
    if low == high:  # one value is shown against zero
        low, high = min(low, 0.0), max(high, 0.0) if low else 1.0
    step = round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def mark_text(value: float, step: float) -> str:
    """A mark of an axis, with as many digits as its step needs."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(step)) + 1e-9)
    if 3 <= exponent < 9:
        return f"{value / 1e6:g}M" if exponent >= 6 else f"{value / 1e3:g}k"
    if not -3 <= exponent < 9:
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) - exponent)
        mantissa, power = f"{value:.{digits}e}".split("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:,.{max(0, -exponent)}f}"


def rounded(value: float | None) -> float | None:
    """To the digits that are shown."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Bin:
    low: float
    high: float
    count: int


def histogram(values: Sequence[float], about: int = 20) -> list[Bin]:
    """Counts in stretches of one round width; zero is an edge, so that no bar holds both signs."""
    low, high = min(0.0, *values), max(0.0, *values)
    edges = ticks(low, high, about) if high > low else [-1.0, 0.0, 1.0]
    width = edges[1] - edges[0]
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[min(max(math.floor((value - edges[0]) / width + 1e-9), 0), len(counts) - 1)] += 1
    return [Bin(low, high, count) for low, high, count in zip(edges, edges[1:], counts, strict=False)]


@dataclass(frozen=True)
class Bars:
    """A histogram, ready to draw."""

    bins: Sequence[Bin]

    width, height, left, right, top, bottom = 480, 220, LEFT, 480 - RIGHT, TOP, 220 - BOTTOM

    @cached_property
    def x(self) -> Axis:
        low, high = self.bins[0].low, self.bins[-1].high
        return Axis(low, high, self.left, self.right, [mark for mark in ticks(low, high, 6) if low <= mark <= high])

    @cached_property
    def y(self) -> Axis:
        marks = [mark for mark in ticks(0, max(bin.count for bin in self.bins)) if mark == int(mark)]
        return Axis(0, marks[-1], self.bottom, self.top, marks)
