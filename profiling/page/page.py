"""A profile as one self-contained HTML page, without scripts, fonts or network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import msgspec

from trio_edge.profiling.page.figures import (
    LIGHT,
    OUTSIDE,
    SCHEME,
    Plot,
    Point,
    colour,
    curves,
    plotted,
    stacked,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.measure.ceilings import Ceilings
    from trio_edge.profiling.measure.layers import Phase
    from trio_edge.profiling.report.profile import BundleProfile, ProfileReport
    from trio_edge.profiling.statistics import Distribution


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


_MEGABYTE = 1e6
_MARGIN = 1.6
"""Factor by which the roofline extends beyond the points."""
_MEDIAN = "Median and its 95 % interval (with fewer than six runs, their range)"


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
