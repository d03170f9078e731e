"""``calibration.html``: one self-contained page; its template escapes all values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.calibration.search.schedules.candidates import spread
from trio_edge.profiling.page.figures import (
    LIGHT,
    Curve,
    Drawing,
    Plot,
    Point,
    canvas,
    check_matplotlib,
    colour,
    draw_curve,
    draw_points,
)
from trio_edge.profiling.page.page import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.quantize.report import GroupError, QuantizationReport
    from trio_edge.calibration.search.calibration_file import Calibration, FrontPoint, Measure


MAX_ROWS = 20
"""Most rows in the table of the front; calibration.json has all points."""


def check_plots() -> None:
    """Raise DataError unless plots can be drawn."""
    check_matplotlib("trio-calibrate", extra="calibrate")


def page_of(calibration: Calibration, *, command: str) -> str:
    """Return the page; ``command`` is the one that exports the same bundle again."""
    quantization = calibration.quantization
    page = render(
        "trio_edge.calibration.search:page.html.jinja",
        calibration=calibration,
        command=command,
        front=spread(calibration.front, MAX_ROWS),
        front_plots=front_plots(calibration),
        layers_plot=layers_plot(calibration),
        quantization_plots=quantization_plots(quantization) if quantization else (),
        nats=_nats,
        percent=_percent,
        stages=_stages,
    )
    return page.decode()


def _nats(measure: Measure) -> str:
    low, high = measure.interval_95
    return f"{measure.value:.4f} ({low:.4f}–{high:.4f})"


def _percent(measure: Measure) -> str:
    low, high = measure.interval_95
    return f"{100 * measure.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _stages(stages: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{layer}:{keep}" for layer, keep in stages) or "none (keep-all)"


_LEAST_KL = 1e-5
"""Nats; smaller values are drawn here, at the end of the logarithmic axis."""
_HELD_OUT, _CHOSEN, _USUAL, _SEARCH = colour(0), colour(1), colour(4), "other"
_KL = "KL to keep-all, nats"


def front_plots(calibration: Calibration) -> list[Plot]:
    """Return the plots of divergence and of agreement against cost, with the held-out samples' 95 % intervals."""
    legend = [(_SEARCH, "search samples"), (_HELD_OUT, "held-out samples"), (_CHOSEN, "chosen")]
    if calibration.usual is not None:
        legend.append((_USUAL, "trio-export's own, same keep"))
    return [_divergence(calibration, legend), _agreement(calibration, [legend[1], *legend[2:]])]


def _divergence(calibration: Calibration, legend: Sequence[tuple[str, str]]) -> Plot:
    title = "Divergence against cost"
    with canvas(title, x_label=_cost_label(calibration), y_label=_KL) as drawn:
        drawn.axes.set_yscale("log")
        search = [_point(_cost(calibration, one), _visible(one.search.kl.value)) for one in calibration.front]
        draw_curve(drawn, Curve("search samples", search), _SEARCH)
        _draw_front(drawn, calibration, "kl")
        if calibration.options.max_kl:
            drawn.axes.axhline(calibration.options.max_kl, color=LIGHT[_CHOSEN], linewidth=1, linestyle="--")
    return Plot(title=title, note="", svg=drawn.svg, legend=legend)


def _agreement(calibration: Calibration, legend: Sequence[tuple[str, str]]) -> Plot:
    title = "Agreement against cost"
    with canvas(title, x_label=_cost_label(calibration), y_label="same answer as keep-all, %") as drawn:
        _draw_front(drawn, calibration, "agreement")
    return Plot(title=title, note="", svg=drawn.svg, legend=legend)


def _draw_front(drawn: Drawing, calibration: Calibration, measure: str) -> None:
    """Draw all points' figures on held-out samples, and mark the chosen schedule and trio-export's default."""
    points = [_held_out(calibration, one, measure) for one in calibration.front]
    draw_points(drawn, Curve("held-out samples", points), _HELD_OUT)
    marked = [(calibration.chosen, "*", _CHOSEN, "chosen")]
    if calibration.usual is not None:
        marked.insert(0, (calibration.usual, "D", _USUAL, "trio-export's own"))  # the star stays on top
    for one, marker, style, name in marked:
        point = _held_out(calibration, one, measure)
        alone = Curve(name, [_point(point.at, point.value)])
        draw_points(drawn, alone, style, marker=marker, size=14)


def layers_plot(calibration: Calibration) -> Plot:
    """Return the plot of single stages' divergence by layer, one line per budget."""
    title, keeps = "Error of one stage alone", sorted({stage.keep for stage in calibration.single_stages})
    with canvas(title, x_label="layer of the stage", y_label=_KL) as drawn:
        drawn.axes.set_yscale("log")
        for index, keep in enumerate(keeps):
            stages = sorted(
                (one.layer, _visible(one.kl)) for one in calibration.single_stages if one.keep == keep
            )
            draw_curve(drawn, Curve(f"keep {keep}", [_point(*stage) for stage in stages]), colour(index))
        _mark_stages(drawn, calibration)
    legend = [(colour(index), f"keep {keep}") for index, keep in enumerate(keeps)]
    return Plot(title=title, note="", svg=drawn.svg, legend=legend)


def quantization_plots(report: QuantizationReport) -> list[Plot]:
    """Return the plots of each group's error by layer, calibrated and rounded to nearest."""
    groups: dict[str, list[GroupError]] = {}
    for error in report.errors:
        if error.layer is not None:
            groups.setdefault(f"{error.part}: {error.group.replace('_', ', ')}", []).append(error)
    styles = {"rounded": _SEARCH, "calibrated": _HELD_OUT}
    plots = []
    for title, errors in groups.items():
        with canvas(title, x_label="layer", y_label="squared error of the outputs, %") as drawn:
            drawn.axes.set_yscale("log")
            for name, style in styles.items():
                points = [_point(error.layer or 0, 100 * getattr(error, name)) for error in errors]
                draw_curve(drawn, Curve(name, points), style)
        legend = [(style, name) for name, style in styles.items()]
        plots.append(Plot(title=title, note="", svg=drawn.svg, legend=legend))
    return plots


def _held_out(calibration: Calibration, point: FrontPoint, measure: str) -> Point:
    found: Measure = getattr(point.held_out, measure)
    values = (found.interval_95[0], found.value, found.interval_95[1])
    low, value, high = map(_visible, values) if measure == "kl" else (100 * one for one in values)
    return Point(_cost(calibration, point), min(low, value), value, max(high, value))


def _point(at: float, value: float) -> Point:
    return Point(at, value, value, value)


def _cost(calibration: Calibration, point: FrontPoint) -> float:
    return point.first_token_ms if calibration.compared_by == "time" else point.flops / 1e9


def _cost_label(calibration: Calibration) -> str:
    if calibration.compared_by == "time":
        return f"predicted ms to the first token, {calibration.options.target}"
    return "GFLOPs of the prefill with the vision encoder"


def _mark_stages(drawn: Drawing, calibration: Calibration) -> None:
    drawn.axes.xaxis.get_major_locator().set_params(integer=True)
    for layer, _keep in calibration.chosen.stages:
        drawn.axes.axvline(layer, color=LIGHT[_CHOSEN], linewidth=1, linestyle="--")


def _visible(kl: float) -> float:
    return max(kl, _LEAST_KL)
