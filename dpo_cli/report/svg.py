"""Curves, histograms and intervals as coordinates for the SVG of a report. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

Point = tuple[float, float | None]  # a step and its value; None if it is not finite


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


WIDTH, HEIGHT = 360, 200  # of a plot, in the units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 48, 16, 12, 24  # around the drawing area
MOST_POINTS = 240  # of a drawn curve: about one per pixel
DIGITS = 3  # of a value read from a curve


@dataclass(frozen=True)
class Axis:
    """A range of values on an axis, with a mark at each multiple of a round number."""

    low: float
    high: float
    start: float  # the position of `low`; `end` is that of `high`
    end: float
    marks: Sequence[float]

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def labelled(self) -> Iterator[tuple[float, str]]:
        """The position and the text of each mark."""
        step = self.marks[1] - self.marks[0] if len(self.marks) > 1 else self.marks[0]
        return ((self.at(mark), mark_text(mark, step)) for mark in self.marks)


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps, of training or held-out rows. `colour` is the number of its colour."""

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
        """Whether the curve is so dense that it looks like an area."""
        return len(self.points) > MOST_POINTS // 2

    @property
    def last(self) -> float | None:
        return self.points[-1][1] if self.points else None


@dataclass(frozen=True)
class Plot:
    """Curves of one quantity over one axis. A `level` is a value to compare with, and its name."""

    title: str
    note: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[float, str]] = ()
    end: float = 0  # the last step of all plots
    from_zero: bool = False  # for a distance or a size, which has a meaningful zero

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
        """The curve as `d` of an SVG path; it is interrupted at values that are not finite."""
        parts, pen = [], "M"
        for step, value in curve.points:
            if value is None:
                pen = "M"
                continue
            parts.append(f"{pen}{self.x.at(step):g} {self.y.at(value):g}")
            pen = "L"
        return "".join(parts)

    def dots(self, curve: Curve) -> list[tuple[float, float]]:
        """The positions of the measured values of a curve; none if they are too many."""
        if (curve.split == "train" and len(curve.points) > 1) or len(curve.points) > MOST_POINTS // 4:
            return []
        return [(self.x.at(step), self.y.at(value)) for step, value in curve.points if value is not None]

    @property
    def broken(self) -> list[float]:
        """The positions of values that are not finite."""
        return sorted({self.x.at(step) for curve in self.drawn for step, value in curve.points if value is None})

    @property
    def data(self) -> list[list[list[float | None]]]:
        """The data for the pointer: the steps and the values of each curve."""
        return [[[step for step, _ in curve.points], [rounded(value) for _, value in curve.points]] for curve in self.drawn]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `MOST_POINTS` points: the minimum and the maximum of each stretch, so that no spike is lost, and both ends.

    In a stretch with values that are not finite, the first of them replaces the maximum.
    """
    if len(points) <= most:
        return list(points)
    stretches = (most - 2) // 2
    inner = range(1, len(points) - 1)
    indices = {0, len(points) - 1}
    for number in range(stretches):
        part = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        finite = [(value, i) for i in part if (value := points[i][1]) is not None]
        broken = next((i for i in part if points[i][1] is None), None)
        indices |= {min(finite)[1]} if finite else set()
        indices |= {broken} if broken is not None else {max(finite)[1]}
    return [points[i] for i in sorted(indices)]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that span low to high, in at most one stretch more than requested."""
    if low == high:  # a single value is shown relative to zero
        low, high = min(low, 0.0), max(high, 0.0) if low else 1.0
    step = round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))


def mark_text(value: float, step: float) -> str:
    """The text of a mark, with the digits that its step needs."""
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
    """Rounded to the digits that are shown."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


@dataclass(frozen=True)
class Bin:
    low: float
    high: float
    count: int


def histogram(values: Sequence[float], about: int = 20) -> list[Bin]:
    """Counts in bins of one round width; zero is an edge, so that no bin has both signs."""
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
