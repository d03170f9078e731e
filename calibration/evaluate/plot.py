"""A plot of accuracy against FLOPs, one line per method, as a file of its own."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.evaluate.report_table import flops_unit
from trio_edge.profiling.page.figures import LIGHT, check_matplotlib, colour, figure_style, new_figure
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import check_outputs, write_output

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.evaluate.comparison import EvaluationReport, RunReport

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vP*X<>"
_INCHES = (8.0, 5.0)
_DOTS_PER_INCH = 150


def check_plot(path: Path) -> None:
    """Raise DataError unless a plot can be written to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"--plot: expected a name that ends in .png or .svg, got {path}; rename it")
    check_outputs({"--plot": path})
    check_matplotlib("--plot", extra="eval")


def draw_plot(report: EvaluationReport, path: Path) -> None:
    """Write the plot as PNG or SVG, by ``path``'s suffix."""
    content = io.BytesIO()
    with figure_style(report.data.name):
        figure = new_figure(*_INCHES)
        axes = figure.add_subplot()
        unit, size = flops_unit(max(run.flops for run in report.runs))
        for index, method in enumerate(dict.fromkeys(run.run.method for run in report.runs)):
            runs = sorted((run for run in report.runs if run.run.method == method), key=lambda run: run.flops)
            _draw_method(axes, runs, index=index, size=size)
        axes.set(
            xlabel=f"{unit} of a prefill, mean",
            ylabel=f"{report.data.metric} accuracy, % (95 % interval)",
            title=f"{report.data.name}, {report.data.compared} questions",
        )
        axes.legend()
        figure.savefig(content, format=path.suffix[1:].lower(), dpi=_DOTS_PER_INCH, facecolor=LIGHT["back"])
    write_output("--plot", path, content.getvalue())


def _draw_method(axes: Any, runs: list[RunReport], *, index: int, size: float) -> None:
    accuracies = [100 * run.accuracy.value for run in runs]
    bounds = [[100 * end for end in run.accuracy.interval_95] for run in runs]
    axes.errorbar(
        [run.flops / size for run in runs],
        accuracies,
        yerr=[
            [max(0.0, value - low) for value, (low, _) in zip(accuracies, bounds)],
            [max(0.0, high - value) for value, (_, high) in zip(accuracies, bounds)],
        ],
        color=LIGHT[colour(index)],
        marker=_MARKERS[index % len(_MARKERS)],
        capsize=3,
        label=runs[0].run.method,
    )
