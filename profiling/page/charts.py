"""The two kinds of figure that several quantities share: stacked bars, and curves with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trio_edge.profiling.page.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    ROW,
    TOP,
    WIDTH,
    Dot,
    Line,
    Plot,
    Rect,
    Text,
    colour,
    draw_axes,
    linear,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

HEIGHT = 260
OUTSIDE = "outside of graphs"
_GAP = 22


class Bar(NamedTuple):
    """One bar and its parts, each with its length."""

    label: str
    parts: Sequence[tuple[str, float]]


class Point(NamedTuple):
    """A time and its interval."""

    at: float
    low: float
    ms: float
    high: float


class Curve(NamedTuple):
    """Times in ascending order of where they are."""

    name: str
    points: Sequence[Point]


def stacked(bars: Sequence[Bar], *, title: str, unit: str, note: str) -> Plot:
    """Return bars under each other; parts of one name have one colour, and ``OUTSIDE`` is grey."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    if OUTSIDE in names:
        names.append(names.pop(names.index(OUTSIDE)))
    height = TOP + len(bars) * (ROW + _GAP)
    plot = Plot(title=title, note=note, height=height + BOTTOM)
    totals = [sum(value for _, value in bar.parts) for bar in bars]
    x = linear(totals, start=8, end=WIDTH - RIGHT)
    for index, (bar, total) in enumerate(zip(bars, totals)):
        y, at = TOP + index * (ROW + _GAP) + 14, x.place(0)
        plot.texts.append(Text(x=8, y=y - 4, text=f"{bar.label}: {short(total)} {unit}", anchor="start"))
        done = 0.0
        for name, value in bar.parts:
            end = x.place(done + value)
            style = _style(name, names)
            tip = f"{name}: {short(value)} {unit}"
            plot.rects.append(Rect(x=at, y=y, width=round(end - at, 2), height=ROW - 4, style=style, tip=tip))
            done, at = done + value, end
    for tick in x.ticks():
        plot.texts.append(Text(x=x.place(tick), y=height + 14, text=short(tick)))
    plot.texts.append(Text(x=WIDTH / 2, y=height + 30, text=unit))
    plot.legend = [(_style(name, names), name) for name in names]
    return plot


def curves(series: Sequence[Curve], *, title: str, note: str, x_label: str) -> Plot:
    """Return milliseconds over something, one curve for each of ``series``."""
    left, right, bottom, top = frame()
    x = linear([point.at for one in series for point in one.points], start=left, end=right)
    y = linear([point.high for one in series for point in one.points], start=bottom, end=top)
    plot = Plot(title=title, note=note, height=HEIGHT)
    draw_axes(plot, x, y, x_label=x_label, y_label="ms")
    for index, (name, points) in enumerate(series):
        style = colour(index)
        line = " ".join(f"{x.place(point.at)},{y.place(point.ms)}" for point in points)
        plot.lines.append(Line(points=line, style=style))
        for point in points:
            place, low, high = x.place(point.at), y.place(point.low), y.place(point.high)
            plot.lines.append(Line(points=f"{place},{low} {place},{high}", style=style))
            tip = f"{name}: {short(point.ms)} ms at {short(point.at)} {x_label}"
            plot.dots.append(Dot(x=place, y=y.place(point.ms), style=style, tip=tip))
        plot.legend.append((style, name))
    return plot


def frame() -> tuple[float, float, float, float]:
    """Return where x starts and ends, and where y does, in a figure of ``HEIGHT``."""
    return LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP


def _style(name: str, names: Sequence[str]) -> str:
    return "host" if name == OUTSIDE else colour(names.index(name))
