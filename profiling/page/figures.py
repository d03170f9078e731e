"""Figures for pages: matplotlib draws them as SVG inside HTML, in the reader's light or dark scheme.

Only this file imports matplotlib, when it draws. Its wheels exist for every machine of the runtime.
"""

from __future__ import annotations

import html
import io
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


SCHEME = {
    "text": ("#1b1f24", "#e6edf3"),
    "back": ("#ffffff", "#0d1117"),
    "soft": ("#59636e", "#9aa4b0"),
    "rule": ("#d1d9e0", "#30363d"),
    "box": ("#f6f8fa", "#161b22"),
    "other": ("#b4bcc4", "#59626c"),
    "c0": ("#2a6fb0", "#6cb0f0"),
    "c1": ("#d9722b", "#f0a060"),
    "c2": ("#2f8f5b", "#6cc795"),
    "c3": ("#b2455f", "#e98aa0"),
    "c4": ("#7a5bb5", "#b59ce8"),
    "c5": ("#8a6a45", "#c9a880"),
    "c6": ("#3b9aa6", "#7fd0da"),
    "c7": ("#a08a16", "#d8c552"),
    "c8": ("#c0569f", "#e58fcc"),
    "c9": ("#4f6d7a", "#94b3c2"),
    "c10": ("#6b8e23", "#a8cc5c"),
    "c11": ("#c04a2c", "#f08a70"),
}
"""Colours by the name of their CSS variable, in a light and in a dark scheme."""
LIGHT = {name: light for name, (light, _) in SCHEME.items()}
_WIDTH, _HEIGHT = 440, 260  # on a phone 12 points of text become 8 pixels, the least that can be read
_NUM_COLOURS = 12
_MANY = 1e4
"""Above this an axis says "100 M", not "1e+08"."""
_POINTS_PER_INCH = 72  # makes matplotlib's points the units of the SVG's view box
_STYLE = {
    "font.size": 12,
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["text"],
    "axes.edgecolor": LIGHT["soft"],
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.labelcolor": LIGHT["text"],
    "ytick.labelcolor": LIGHT["text"],
    "text.parse_math": False,  # a folder's name may have dollars
    "lines.linewidth": 2,
    "lines.markersize": 8,
    "svg.fonttype": "none",  # text stays text, which can be searched, copied and read aloud
}


@dataclass(slots=True, kw_only=True)
class Plot:
    """One figure of a page."""

    title: str
    note: str
    svg: str
    """An ``svg`` element without ids, so that several fit on a page."""
    legend: Sequence[tuple[str, str]] = ()
    """Names of colours with texts; HTML below the figure, where long names wrap."""


@dataclass(slots=True, kw_only=True)
class Drawing:
    """A figure of a page while it is drawn."""

    axes: Any
    tips: list[str] = field(default_factory=list)
    svg: str = ""
    """Set at the end of ``canvas``'s block."""

    def tip(self, text: str) -> str:
        """Return the ``gid`` of a mark that shows ``text`` while the pointer is over it."""
        self.tips.append(text)
        return f"tip-{len(self.tips) - 1}"


def check_matplotlib(option: str, *, extra: str) -> None:
    """Raise DataError, with the extra to install, unless ``option`` can draw figures."""
    if find_spec("matplotlib") is None:
        raise DataError(
            f'{option}: expected matplotlib to be installed, got none; run pip install "trio-edge[{extra}]"'
        )


@contextmanager
def canvas(title: str, *, height: float = _HEIGHT, x_label: str, y_label: str = "") -> Iterator[Drawing]:
    """Yield a figure of a page's width to draw on; its ``svg`` is made at the end of the block.

    ``title``, a text for screen readers, is unique on the page. ``height`` is in units of the view box.
    """
    with figure_style(title):
        figure = new_figure(_WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH)
        drawn = Drawing(axes=figure.add_subplot())
        drawn.axes.set(xlabel=x_label, ylabel=y_label)
        yield drawn
        for axis in (drawn.axes.xaxis, drawn.axes.yaxis):
            if axis.get_scale() == "log":
                _label_decades(axis)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    drawn.svg = _inline(out.getvalue(), title, drawn.tips)


@contextmanager
def figure_style(salt: str) -> Iterator[None]:
    """Draw figures in the pages' style; with equal ``salt``, equal values give equal SVG."""
    import matplotlib

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": salt}):
        yield


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure; sizes are in inches."""
    from matplotlib.figure import Figure  # pyplot would bring windows and state

    return Figure(figsize=(width, height), dpi=_POINTS_PER_INCH, layout="constrained")


def _label_decades(axis: Any) -> None:
    """Write ticks as plain text; matplotlib's powers of ten would need its math fonts."""
    from matplotlib.ticker import EngFormatter

    low, high = axis.get_view_interval()
    labels = EngFormatter() if high > _MANY else "{x:g}"
    axis.set_major_formatter(labels)
    axis.set_minor_formatter(
        labels if high < 10 * low else ""
    )  # a whole decade needs labels only at its ends


def colour(index: int) -> str:
    """Return the colour's name for series number ``index``."""
    return f"c{index % _NUM_COLOURS}"


def _inline(svg: str, title: str, tips: Sequence[str]) -> str:
    """Return ``svg`` in the page's font and colours, with the marks' texts and without ids."""
    start = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', svg)
    assert start is not None  # matplotlib writes one
    body = svg[start.end() :]
    # matplotlib cannot write CSS variables, so each colour of the light scheme stands for its variable
    for name, light in LIGHT.items():
        body = body.replace(light, f"var(--{name})")
    body = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", body)
    body = re.sub(
        r'<g id="tip-(\d+)">', lambda found: f"<g><title>{html.escape(tips[int(found[1])])}</title>", body
    )
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return f'<svg viewBox="{start[1]}" role="img" aria-label="{html.escape(title)}">{body}'


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
    """Points in ascending order of ``at``."""

    name: str
    points: Sequence[Point]


def stacked(bars: Sequence[Bar], *, title: str, unit: str, note: str) -> Plot:
    """Return stacked bars, one below the other; parts of one name have one colour, and ``OUTSIDE`` is grey."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts if name != OUTSIDE))
    styles = {name: colour(index) for index, name in enumerate(names)} | {OUTSIDE: "other"}
    with canvas(title, height=_ROW * len(bars) + _AXIS, x_label=unit) as drawn:
        for row, bar in enumerate(bars):
            _draw_bar(drawn, row, bar, styles, unit=unit)
        # downwards, so that the first bar is on top
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


def curves(series: Sequence[Curve], *, title: str, note: str, x_label: str) -> Plot:
    """Return curves of milliseconds over ``x_label``."""
    with canvas(title, x_label=x_label, y_label="ms") as drawn:
        for index, one in enumerate(series):
            draw_curve(drawn, one, colour(index))
        drawn.axes.set_xlim(left=0)
        show_zero(drawn)
    legend = [(colour(index), one.name) for index, one in enumerate(series)]
    return Plot(title=title, note=note, svg=drawn.svg, legend=legend)


def draw_curve(drawn: Drawing, curve: Curve, style: str) -> None:
    """Draw the points of ``curve`` as ``draw_points`` does, with a line through them."""
    points = curve.points
    drawn.axes.plot([point.at for point in points], [point.value for point in points], color=LIGHT[style])
    draw_points(drawn, curve, style)


def draw_points(
    drawn: Drawing, curve: Curve, style: str, *, marker: str = "o", size: float | None = None
) -> None:
    """Draw the points of ``curve`` with their intervals; pointing at one shows its value."""
    x, y, ink = drawn.axes.get_xlabel(), drawn.axes.get_ylabel(), LIGHT[style]
    for point in curve.points:
        tip = drawn.tip(f"{curve.name}: {short(point.value)} {y} at {short(point.at)} {x}")
        if point.low < point.high:
            drawn.axes.vlines(point.at, point.low, point.high, color=ink)
        drawn.axes.plot(point.at, point.value, marker, color=ink, markersize=size, gid=tip)


def show_zero(drawn: Drawing) -> None:
    """Start the vertical axis at 0, with space above the values."""
    drawn.axes.set_ylim(0, 1.05 * drawn.axes.get_ylim()[1])


def short(value: float) -> str:
    """Return a number with three digits: 1.23, 340, 14,100."""
    return f"{float(f'{value:.3g}'):,g}"
