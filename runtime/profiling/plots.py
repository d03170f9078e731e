"""The figures of a profile's page."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from trio_edge.runtime.profiling.drawing import (
    BOTTOM,
    LEFT,
    RIGHT,
    ROW,
    TOP,
    WIDTH,
    Axis,
    Dot,
    Line,
    Plot,
    Rect,
    Text,
    colour,
    draw_axes,
    linear,
    logarithmic,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.profiling.distribution import Distribution
    from trio_edge.runtime.profiling.report import BundleProfile, Ceilings, Phase, Report

_HEIGHT = 260
_HOST, _GAP = "outside of graphs", 22
_MEGABYTE = 1e6


def plots_of(report: Report) -> list[Plot]:
    """Return all figures that the report has values for."""
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
    """Return one bar per bundle: medians of its graphs, and what is left of the whole."""
    rows = []
    for bundle in bundles:
        parts = [(graph.name, graph.call_ms.p50) for graph in bundle.graphs if graph.phase == phase]
        host = bundle.host_first_ms.p50 if phase == "prefill" else bundle.host_token_ms
        rows.append([*parts, (_HOST, max(0.0, host or 0.0))])
    return _stacked(bundles, rows, title=title, unit="ms", note="Medians in milliseconds.")


def _memory(bundles: Sequence[BundleProfile]) -> Plot:
    rows = []
    for bundle in bundles:
        memory = bundle.memory
        parts = {
            "weights": memory.weights,
            "KV caches": memory.kv_allocated,
            "buffers": memory.buffers,
            "workspace": memory.workspace,
            "other": memory.other or 0,
        }
        rows.append([(name, count / _MEGABYTE) for name, count in parts.items()])
    note = "What memory is for, in MB. Other: the rest of the process at its peak."
    return _stacked(bundles, rows, title="Memory", unit="MB", note=note)


def _stacked(
    bundles: Sequence[BundleProfile],
    rows: Sequence[Sequence[tuple[str, float]]],
    *,
    title: str,
    unit: str,
    note: str,
) -> Plot:
    names = list(dict.fromkeys(name for row in rows for name, _ in row))
    if _HOST in names:
        names.append(names.pop(names.index(_HOST)))
    height = TOP + len(rows) * (ROW + _GAP)
    plot = Plot(title=title, note=note, height=height + BOTTOM)
    totals = [sum(value for _, value in row) for row in rows]
    x = linear(totals, start=8, end=WIDTH - RIGHT)
    for index, (bundle, row, total) in enumerate(zip(bundles, rows, totals)):
        y, at = TOP + index * (ROW + _GAP) + 14, x.place(0)
        plot.texts.append(Text(x=8, y=y - 4, text=f"{bundle.label}: {short(total)} {unit}", anchor="start"))
        done = 0.0
        for name, value in row:
            end = x.place(done + value)
            style = "host" if name == _HOST else colour(names.index(name))
            tip = f"{name}: {short(value)} {unit}"
            plot.rects.append(Rect(x=at, y=y, width=round(end - at, 2), height=ROW - 4, style=style, tip=tip))
            done, at = done + value, end
    for tick in x.ticks():
        plot.texts.append(Text(x=x.place(tick), y=height + 14, text=short(tick)))
    plot.texts.append(Text(x=WIDTH / 2, y=height + 30, text=unit))
    plot.legend = [("host" if name == _HOST else colour(names.index(name)), name) for name in names]
    return plot


def _frame() -> tuple[float, float, float, float]:
    """Return where x starts and ends, and where y does."""
    return LEFT, WIDTH - RIGHT, _HEIGHT - BOTTOM, TOP


def _first_token(bundles: Sequence[BundleProfile]) -> Plot:
    """Return time to the first token against visual tokens, for each bundle at each size of picture."""
    series = []
    for bundle in bundles:
        points = [(size.visual_tokens, size.ttft_ms) for size in bundle.sizes]
        if all(tokens != bundle.visual_tokens for tokens, _ in points):
            points.append((bundle.visual_tokens, bundle.ttft_ms))
        name = f"{bundle.label}, {bundle.processed_tokens:.0f} on average"
        series.append(_Series(name, sorted(points, key=lambda point: point[0])))
    return _curves(
        series,
        title="Time to the first token against visual tokens",
        note="Median and its 95 % interval, at each size of picture that has shapes of its own.",
        x_label="visual tokens of the picture",
    )


def _decode(bundles: Sequence[BundleProfile]) -> Plot:
    """Return the time of a token against the rows before it, for each bundle."""
    return _curves(
        [
            _Series(
                f"{bundle.label}: {bundle.decode_fit.words}" if bundle.decode_fit else bundle.label,
                [(step.context, step.ms) for step in bundle.decode],
            )
            for bundle in bundles
        ],
        title="Time of a token over context length",
        note="Median and its 95 % interval; visual tokens are not reduced in the context, but are in the rows of the fits.",
        x_label="rows of context",
    )


class _Series(NamedTuple):
    """One bundle's times."""

    name: str
    points: Sequence[tuple[int, Distribution]]


def _curves(series: Sequence[_Series], *, title: str, note: str, x_label: str) -> Plot:
    left, right, bottom, top = _frame()
    x = linear([at for one in series for at, _ in one.points], start=left, end=right)
    y = linear([time.interval_95[1] for one in series for _, time in one.points], start=bottom, end=top)
    plot = Plot(title=title, note=note, height=_HEIGHT)
    draw_axes(plot, x, y, x_label=x_label, y_label="ms")
    for index, (name, points) in enumerate(series):
        style = colour(index)
        line = " ".join(f"{x.place(at)},{y.place(time.p50)}" for at, time in points)
        plot.lines.append(Line(points=line, style=style))
        for at, time in points:
            place = x.place(at)
            low, high = (y.place(end) for end in time.interval_95)
            plot.lines.append(Line(points=f"{place},{low} {place},{high}", style=style))
            tip = f"{name}: {short(time.p50)} ms at {at} {x_label}"
            plot.dots.append(Dot(x=place, y=y.place(time.p50), style=style, tip=tip))
        plot.legend.append((style, name))
    return plot


def _roofline(bundles: Sequence[BundleProfile], ceilings: Ceilings) -> Plot:
    left, right, bottom, top = _frame()
    graphs = [
        (index, bundle.label, graph, graph.intensity, graph.flops_per_s)
        for index, bundle in enumerate(bundles)
        for graph in bundle.graphs
        if graph.intensity and graph.flops_per_s
    ]
    ridge = ceilings.flops_per_s / ceilings.bytes_per_s
    x = logarithmic([ridge, *(intensity for *_, intensity, _ in graphs)], start=left, end=right)
    y = logarithmic([ceilings.flops_per_s, *(rate for *_, rate in graphs)], start=bottom, end=top)
    plot = Plot(
        title="Roofline",
        note="FLOP/s against FLOPs per byte; the line is what the machine reached on the spot. Filled: prefill.",
        height=_HEIGHT,
    )
    draw_axes(plot, x, y, x_label="FLOPs per byte", y_label="FLOP/s")
    plot.lines.append(Line(points=_roof(x, y, ceilings), style="roof"))
    for index, label, graph, intensity, rate in graphs:
        style = colour(index) + (" hollow" if graph.phase == "decode" else "")
        tip = f"{label}: {graph.name}, {graph.phase}: {graph.verdict}"
        plot.dots.append(Dot(x=x.place(intensity), y=y.place(rate), style=style, tip=tip))
    plot.legend = [(colour(index), bundle.label) for index, bundle in enumerate(bundles)]
    return plot


def _roof(x: Axis, y: Axis, ceilings: Ceilings) -> str:
    """Return the line of bandwidth up to the line of arithmetic, as far as it is in the picture."""
    start = max(x.low, y.low / ceilings.bytes_per_s)
    ridge = ceilings.flops_per_s / ceilings.bytes_per_s
    points = [
        (start, start * ceilings.bytes_per_s), (ridge, ceilings.flops_per_s), (x.high, ceilings.flops_per_s)
    ]  # fmt: skip
    return " ".join(f"{x.place(intensity)},{y.place(rate)}" for intensity, rate in points)
