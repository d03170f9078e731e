"""``calibration.html``: one page that needs nothing else, with everything in it escaped by its template."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from trio_edge.calibration.search.report.plots import (
    front_plot,
    importance_plot,
    layers_plot,
    quantization_plot,
)
from trio_edge.calibration.search.schedules.pareto import spread
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from trio_edge.calibration.search.report.calibration_file import Calibration, Measure
    from trio_edge.calibration.search.report.overlays import Overlay

MAX_ROWS = 20
"""Of the table of a front; calibration.json has all of it."""
_TEMPLATE = Path(__file__).parent / "page.html.jinja"


def check_plots() -> None:
    """Raise DataError unless plots can be drawn."""
    if find_spec("matplotlib") is None:
        raise DataError(
            'trio-calibrate: expected matplotlib to be installed, it is not; run pip install "trio-edge[calibrate]"'
        )


def page_of(calibration: Calibration, overlays: Sequence[Overlay], *, command: str) -> str:
    """Return the page.

    Args:
        calibration: What it is about.
        overlays: Pictures to show.
        command: That exports the same bundle without calibrating.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"nats": _nats, "percent": _percent, "stages": _stages}
    quantization = calibration.quantization
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        calibration=calibration,
        command=command,
        front=spread(calibration.front, MAX_ROWS),
        front_plot=front_plot(calibration),
        layers_plot=layers_plot(calibration),
        importance_plot=importance_plot(calibration),
        quantization_plot=quantization_plot(quantization) if quantization and quantization.errors else "",
        overlays=[(overlay, _data_uri(overlay.sheet)) for overlay in overlays],
    )


def _nats(measure: Measure) -> str:
    low, high = measure.interval_95
    return f"{measure.value:.4f} ({low:.4f}–{high:.4f})"


def _percent(measure: Measure) -> str:
    low, high = measure.interval_95
    return f"{100 * measure.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _stages(stages: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{layer}:{keep}" for layer, keep in stages) or "none (keep-all)"


def _data_uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
