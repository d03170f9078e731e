"""``calibration.html``: one page that needs nothing else, with everything in it escaped by its template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.calibration.search.report.plots import (
    front_plots,
    layers_plot,
    quantization_plots,
)
from trio_edge.calibration.search.schedules.pareto import spread
from trio_edge.profiling.page.figures import check_matplotlib
from trio_edge.profiling.page.page import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.search.report.calibration_file import Calibration, Measure

MAX_ROWS = 20
"""Rows in the table of a front; calibration.json has all of them."""


def check_plots() -> None:
    """Raise DataError unless plots can be drawn."""
    check_matplotlib("trio-calibrate", extra="calibrate")


def page_of(calibration: Calibration, *, command: str) -> str:
    """Return the page.

    Args:
        calibration: What it is about.
        command: That exports the same bundle without calibrating.
    """
    quantization = calibration.quantization
    page = render(
        "trio_edge.calibration.search.report:page.html.jinja",
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
