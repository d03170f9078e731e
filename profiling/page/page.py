"""A profile as one self-contained HTML page, without scripts, fonts or network.

matplotlib draws the figures as SVG inside HTML, in the reader's light or dark scheme. Only this file imports it, when it draws. Its
wheels exist for every machine of the runtime.
"""

from __future__ import annotations

import html
import io
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import msgspec

from trio_edge.runtime.bundle.errors import DataError, install_command

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from trio_edge.profiling.measure.ceilings import Ceilings
    from trio_edge.profiling.measure.layers import Phase
    from trio_edge.profiling.report.profile import BundleProfile, ProfileReport
    from trio_edge.profiling.statistics import Distribution


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
OUTSIDE = "outside of graphs"
_ROW, _AXIS = 52, 52
"""Height of a bar with its label, and of the axis below the bars."""
_THICK = 0.5
"""Share of a row that its bar takes; the label has the rest."""
_MEGABYTE = 1e6
_MARGIN = 1.6
"""Factor by which the roofline extends beyond the points."""
_MEDIAN = "Median and its 95 % interval (with fewer than six runs, their range)"


def page_html(report: ProfileReport) -> bytes:
    """Return the page of ``report``: summary, plots, tables, and every value of its JSON."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["number"] = _number
    template, values = environment.get_template("page.html.j2"), msgspec.to_builtins(report)
    return template.render(scheme=SCHEME, report=report, plots=plots_of(report), values=values).encode()


def _number(value: Any) -> str:
    """Return a number as in JSON."""
    return msgspec.json.encode(value).decode()


def plots_of(report: ProfileReport) -> list[Plot]:
    """Return all figures for the report's values."""
    bundles = report.bundles
    plots = [_stacked_time(bundles, "prefill", "Time to the first token by graph")]
    if any(graph.phase == "decode" for bundle in bundles for graph in bundle.graphs):
        plots.append(_stacked_time(bundles, "decode", "Time of a later token by graph"))
    if any(bundle.decode for bundle in bundles):
        plots.append(_decode(bundles))
    plots += [_first_token(bundles), _memory(bundles)]
    if report.ceilings is not None:
        plots.append(_roofline(bundles, report.ceilings))
    return plots


def _stacked_time(bundles: Sequence[BundleProfile], phase: Phase, title: str) -> Plot:
    """Return one bar per bundle: the medians of its graphs, and the time outside of graphs."""
    bars = {}
    for bundle in bundles:
        parts = [(graph.name, graph.call_ms.p50) for graph in bundle.graphs if graph.phase == phase]
        host = bundle.host_first_ms.p50 if phase == "prefill" else bundle.host_token_ms
        bars[bundle.label] = [*parts, (OUTSIDE, max(0.0, host or 0.0))]
    return stacked(bars, title=title, unit="ms", note="Medians in milliseconds.")


def _memory(bundles: Sequence[BundleProfile]) -> Plot:
    bars = {
        bundle.label: [(name, (count or 0) / _MEGABYTE) for name, count in bundle.memory.parts.items()]
        for bundle in bundles
    }
    note = "Memory by purpose, in MB. Other: the rest of the process at its peak."
    return stacked(bars, title="Memory", unit="MB", note=note)


def _first_token(bundles: Sequence[BundleProfile]) -> Plot:
    """Return the time to the first token against visual tokens, for each bundle and image size."""
    series = {}
    for bundle in bundles:
        points = [_point(size.visual_tokens, size.ttft_ms) for size in bundle.sizes]
        if all(point.at != bundle.visual_tokens for point in points):
            points.append(_point(bundle.visual_tokens, bundle.ttft_ms))
        series[f"{bundle.label}, {bundle.processed_tokens:.0f} on average"] = sorted(points)
    return curves(
        series,
        title="Time to the first token against visual tokens",
        note=f"{_MEDIAN}, at each image size that has shapes of its own.",
        x_label="visual tokens of the image",
    )


def _decode(bundles: Sequence[BundleProfile]) -> Plot:
    """Return the time per token against the context length, for each bundle."""
    series = {}
    for bundle in bundles:
        name = f"{bundle.label}: {bundle.decode_fit.words}" if bundle.decode_fit else bundle.label
        series[name] = [_point(step.context, step.ms) for step in bundle.decode]
    return curves(
        series,
        title="Time of a token over context length",
        note=f"{_MEDIAN}. The context counts all visual tokens, the rows of the fits only those kept.",
        x_label="rows of context",
    )


def _point(at: int, time: Distribution) -> Point:
    low, high = time.range
    return Point(at, low, time.p50, high)


def _roofline(bundles: Sequence[BundleProfile], ceilings: Ceilings) -> Plot:
    ridge = ceilings.flops_per_s / ceilings.bytes_per_s
    places = [ridge]
    note = "FLOP/s against FLOPs per byte; the line shows the measured peak rates. Filled: prefill."
    with plotted("Roofline", note=note, x_label="FLOPs per byte", y_label="FLOP/s") as plot:
        plot.axes.set(xscale="log", yscale="log")
        for index, bundle in enumerate(bundles):
            ink = LIGHT[colour(index)]
            for graph in bundle.graphs:
                if graph.intensity and graph.flops_per_s:
                    plot.axes.plot(
                        graph.intensity,
                        graph.flops_per_s,
                        "o",
                        color=ink,
                        markerfacecolor=LIGHT["box"] if graph.phase == "decode" else ink,
                        markeredgewidth=2,
                        gid=plot.tip(f"{bundle.label}: {graph.name}, {graph.phase}: {graph.verdict}"),
                    )
                    places.append(graph.intensity)
        ends = [min(places) / _MARGIN, ridge, max(places) * _MARGIN]
        roof = [min(ceilings.flops_per_s, end * ceilings.bytes_per_s) for end in ends]
        plot.axes.plot(ends, roof, color=LIGHT["text"], zorder=1)
    plot.legend = [(colour(index), bundle.label) for index, bundle in enumerate(bundles)]
    return plot


@dataclass(slots=True, kw_only=True)
class Plot:
    """One figure of the page."""

    title: str
    note: str
    axes: Any
    """The axes that it is drawn on."""
    legend: Sequence[tuple[str, str]] = ()
    """Names of colours with texts; HTML below the figure, where long names wrap."""
    tips: list[str] = field(default_factory=list)
    svg: str = ""
    """An ``svg`` element without ids, so that several fit on a page; set at the end of ``plotted``'s block."""

    def tip(self, text: str) -> str:
        """Return the ``gid`` of a mark that shows ``text`` while the pointer is over it."""
        self.tips.append(text)
        return f"tip-{len(self.tips) - 1}"


def check_matplotlib() -> None:
    """Raise DataError, with the extra to install, unless figures can be drawn."""
    if find_spec("matplotlib") is None:
        raise DataError(
            f"--html: expected matplotlib to be installed, got none; run {install_command('profile')}"
        )


@contextmanager
def plotted(
    title: str, *, note: str, x_label: str, y_label: str = "", height: float = _HEIGHT
) -> Iterator[Plot]:
    """Yield a figure of the page's width to draw on; its ``svg`` is made at the end of the block.

    ``title``, also a text for screen readers, is unique on the page. ``height`` is in units of the view box.
    """
    import matplotlib
    from matplotlib.figure import Figure  # pyplot would bring windows and state

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):  # the salt: equal values give equal SVG
        size = (_WIDTH / _POINTS_PER_INCH, height / _POINTS_PER_INCH)
        figure = Figure(figsize=size, dpi=_POINTS_PER_INCH, layout="constrained")
        plot = Plot(title=title, note=note, axes=figure.add_subplot())
        plot.axes.set(xlabel=x_label, ylabel=y_label)
        yield plot
        for axis in (plot.axes.xaxis, plot.axes.yaxis):
            if axis.get_scale() == "log":
                _label_decades(axis)
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    plot.svg = _inline(out.getvalue(), title, plot.tips)


def _label_decades(axis: Any) -> None:
    """Write ticks as plain text; matplotlib's powers of ten would need its math fonts."""
    from matplotlib.ticker import EngFormatter

    low, high = axis.get_view_interval()
    labels = EngFormatter() if high > _MANY else "{x:g}"
    axis.set_major_formatter(labels)
    # a whole decade needs labels only at its ends
    axis.set_minor_formatter(labels if high < 10 * low else "")


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


class Point(NamedTuple):
    """A value and its interval."""

    at: float
    low: float
    value: float
    high: float


def stacked(bars: Mapping[str, Sequence[tuple[str, float]]], *, title: str, unit: str, note: str) -> Plot:
    """Return stacked bars, one below the other, by their label; each has names of parts with their lengths.

    Parts of one name have one colour, and ``OUTSIDE`` is grey.
    """
    names = list(dict.fromkeys(name for parts in bars.values() for name, _ in parts if name != OUTSIDE))
    styles = {name: colour(index) for index, name in enumerate(names)} | {OUTSIDE: "other"}
    with plotted(title, note=note, height=_ROW * len(bars) + _AXIS, x_label=unit) as plot:
        for row, (label, parts) in enumerate(bars.items()):
            end = 0.0
            for name, value in parts:
                plot.axes.barh(
                    row,
                    value,
                    _THICK,
                    left=end,
                    color=LIGHT[styles[name]],
                    edgecolor=LIGHT["box"],
                    gid=plot.tip(f"{name}: {short(value)} {unit}"),
                )
                end += value
            plot.axes.text(0, row - 0.33, f"{label}: {short(end)} {unit}")
        # downwards, so that the first bar is on top
        plot.axes.set(ylim=(len(bars) - 0.5, -0.75), yticks=())
        plot.axes.spines["left"].set_visible(False)
    shown = {name for parts in bars.values() for name, _ in parts}
    plot.legend = [(style, name) for name, style in styles.items() if name in shown]
    return plot


def curves(series: Mapping[str, Sequence[Point]], *, title: str, note: str, x_label: str) -> Plot:
    """Return curves of milliseconds over ``x_label``, by name; points are in ascending order of ``at``."""
    with plotted(title, note=note, x_label=x_label, y_label="ms") as plot:
        for index, (name, points) in enumerate(series.items()):
            ink = LIGHT[colour(index)]
            plot.axes.plot([point.at for point in points], [point.value for point in points], color=ink)
            for point in points:
                tip = plot.tip(f"{name}: {short(point.value)} ms at {short(point.at)} {x_label}")
                if point.low < point.high:
                    plot.axes.vlines(point.at, point.low, point.high, color=ink)
                plot.axes.plot(point.at, point.value, "o", color=ink, gid=tip)
        plot.axes.set_xlim(left=0)
        plot.axes.set_ylim(0, 1.05 * plot.axes.get_ylim()[1])  # space above the values
    plot.legend = [(colour(index), name) for index, name in enumerate(series)]
    return plot


def short(value: float) -> str:
    """Return a number with three digits: 1.23, 340, 14,100."""
    return f"{float(f'{value:.3g}'):,g}"
