"""The two kinds of figure that several quantities share: stacked bars, and curves with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trio_edge.profiling.page.figures import LIGHT, Drawing, Plot, canvas, colour

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OUTSIDE = "outside of graphs"
_ROW, _AXIS = 52, 52
"""Height of a bar with its label, and of the axis below the bars."""
_THICK = 0.5
"""Share of a row that its bar takes; the label has the rest."""


class Bar(NamedTuple):
    """One bar and its parts, each with its length."""

    label: str
    parts: Sequence[tuple[str, float]]


class Point(NamedTuple):
    """A value and its interval."""

    at: float
    low: float
    value: float
    high: float


class Curve(NamedTuple):
    """Values in ascending order of where they are."""

    name: str
    points: Sequence[Point]


def stacked(bars: Sequence[Bar], *, title: str, unit: str, note: str) -> Plot:
    """Return bars under each other; parts of one name have one colour, and ``OUTSIDE`` is grey."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts if name != OUTSIDE))
    styles = {name: colour(index) for index, name in enumerate(names)} | {OUTSIDE: "other"}
    with canvas(title, height=_ROW * len(bars) + _AXIS, x_label=unit) as drawn:
        for row, bar in enumerate(bars):
            _draw_bar(drawn, row, bar, styles, unit=unit)
        # Downwards, so that the first bar is on top.
        drawn.axes.set(ylim=(len(bars) - 0.5, -0.75), yticks=())
        drawn.axes.spines["left"].set_visible(False)
    shown = [name for name in styles if any(name in dict(bar.parts) for bar in bars)]
    return Plot(title=title, note=note, svg=drawn.svg, legend=[(styles[name], name) for name in shown])


def _draw_bar(drawn: Drawing, row: int, bar: Bar, styles: Mapping[str, str], *, unit: str) -> None:
    end = 0.0
    for name, value in bar.parts:
        drawn.axes.barh(
            row,
            value,
            _THICK,
            left=end,
            color=LIGHT[styles[name]],
            edgecolor=LIGHT["box"],
            gid=drawn.tip(f"{name}: {short(value)} {unit}"),
        )
        end += value
    drawn.axes.text(0, row - 0.33, f"{bar.label}: {short(end)} {unit}")


def curves(series: Sequence[Curve], *, title: str, note: str, x_label: str, y_label: str = "ms") -> Plot:
    """Return values over something, one curve for each of ``series``."""
    with canvas(title, x_label=x_label, y_label=y_label) as drawn:
        for index, one in enumerate(series):
            draw_curve(drawn, one, colour(index))
        drawn.axes.set_xlim(left=0)
        show_zero(drawn)
    legend = [(colour(index), one.name) for index, one in enumerate(series)]
    return Plot(title=title, note=note, svg=drawn.svg, legend=legend)


def draw_curve(drawn: Drawing, curve: Curve, style: str) -> None:
    """Draw a line through the points of ``curve``, and what ``draw_points`` draws."""
    points = curve.points
    drawn.axes.plot([point.at for point in points], [point.value for point in points], color=LIGHT[style])
    draw_points(drawn, curve, style)


def draw_points(
    drawn: Drawing, curve: Curve, style: str, *, marker: str = "o", size: float | None = None
) -> None:
    """Draw the intervals of ``curve``, and marks that show their values; without a line between them.

    Args:
        drawn: Where.
        curve: The points.
        style: Name of their colour.
        marker: matplotlib's word for the mark.
        size: Size of the mark; None for the usual one.
    """
    x, y, ink = drawn.axes.get_xlabel(), drawn.axes.get_ylabel(), LIGHT[style]
    for point in curve.points:
        tip = drawn.tip(f"{curve.name}: {short(point.value)} {y} at {short(point.at)} {x}")
        if point.low < point.high:
            drawn.axes.vlines(point.at, point.low, point.high, color=ink)
        drawn.axes.plot(point.at, point.value, marker, color=ink, markersize=size, gid=tip)


def show_zero(drawn: Drawing) -> None:
    """Let the vertical axis begin at 0, with room above the values."""
    drawn.axes.set_ylim(0, 1.05 * drawn.axes.get_ylim()[1])


def short(value: float) -> str:
    """Return a number with three digits: 1.23, 340, 14,100."""
    return f"{float(f'{value:.3g}'):,g}"
