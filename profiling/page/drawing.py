"""The few shapes that the page's plots are made of, and axes to place them on. Coordinates are those of the SVG's view box."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 440
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 40
ROW = 30
NUM_COLOURS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Rect:
    """A bar."""

    x: float
    y: float
    width: float
    height: float
    style: str
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A path through points, as SVG's ``points`` attribute."""

    points: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A marker."""

    x: float
    y: float
    style: str
    tip: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A label."""

    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "middle"
    turned: bool = False


@dataclass(slots=True, kw_only=True)
class Plot:
    """One figure."""

    title: str
    note: str
    height: float
    rects: list[Rect] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    dots: list[Dot] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Style and text."""
    width: float = WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """Maps values between two ends to coordinates, on a linear or a logarithmic scale."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Return the coordinate of ``value``."""
        low, high = (math.log10(one) if self.logarithmic else one for one in (self.low, self.high))
        at = math.log10(value) if self.logarithmic else value
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        """Return round values between the ends."""
        if self.logarithmic:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            step = max(1, -(-(last - first) // 6))
            return [10.0**power for power in range(first, last + 1, step)]
        rough = (self.high - self.low) / 4
        size = 10.0 ** math.floor(math.log10(rough))
        step_size = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
        count = math.floor(self.high / step_size + 1e-9)
        return [round(index * step_size, 12) for index in range(math.ceil(self.low / step_size), count + 1)]


def linear(values: Sequence[float], *, start: float, end: float) -> Axis:
    """Return an axis from 0 with room for ``values``, which are not below it."""
    most = max(values)
    return Axis(low=0.0, high=1.05 * most if most > 0 else 1.0, start=start, end=end)


def logarithmic(values: Sequence[float], *, start: float, end: float) -> Axis:
    """Return a logarithmic axis with room for ``values``, all above 0."""
    return Axis(low=min(values) / 1.6, high=max(values) * 1.6, start=start, end=end, logarithmic=True)


def draw_axes(plot: Plot, x: Axis, y: Axis, *, x_label: str, y_label: str) -> None:
    """Add ticks, grid lines and labels."""
    bottom, left = y.start, x.start
    for tick in x.ticks():
        at = x.place(tick)
        plot.lines.append(Line(points=f"{at},{y.start} {at},{y.end}", style="grid"))
        plot.texts.append(Text(x=at, y=bottom + 14, text=short(tick)))
    for tick in y.ticks():
        at = y.place(tick)
        plot.lines.append(Line(points=f"{x.start},{at} {x.end},{at}", style="grid"))
        plot.texts.append(Text(x=left - 5, y=at + 4, text=short(tick), anchor="end"))
    plot.lines.append(Line(points=f"{left},{y.end} {left},{bottom} {x.end},{bottom}", style="axis"))
    plot.texts.append(Text(x=(x.start + x.end) / 2, y=bottom + 30, text=x_label))
    plot.texts.append(Text(x=12, y=(y.start + y.end) / 2, text=y_label, turned=True))


def colour(index: int) -> str:
    """Return the style of the series with this number."""
    return f"c{index % NUM_COLOURS}"


def short(value: float) -> str:
    """Return a number in few characters: 1.2, 340, 12 k, 3.4 M, 5 G."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == ' k' else size):.3g}{unit}"
    return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
