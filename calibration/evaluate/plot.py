"""A plot of accuracy against FLOPs, one line per method. The only file that imports matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.evaluate.report_table import flops_unit
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.evaluate.comparison import EvaluationReport, RunReport

SUFFIXES = (".png", ".svg")
_MARKERS = "osD^vP*X<>"
_DOTS_PER_INCH = 150


def check_plot(path: Path) -> None:
    """Raise DataError unless a plot can be written to ``path``."""
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"--plot: expected a name that ends in .png or .svg, got {path}; rename it")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"--plot: expected a file in an existing folder, got {path}; create the folder")
    if find_spec("matplotlib") is None:
        raise DataError(
            '--plot: expected matplotlib to be installed, it is not; run pip install "trio-edge[eval]"'
        )


def draw_plot(report: EvaluationReport, path: Path) -> None:
    """Write the plot as PNG or SVG, by ``path``'s suffix."""
    from matplotlib.figure import Figure  # without pyplot: no window, no state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    unit, size = flops_unit(max(run.flops for run in report.runs))
    methods = list(dict.fromkeys(run.run.method for run in report.runs))
    for number, method in enumerate(methods):
        runs = sorted((run for run in report.runs if run.run.method == method), key=lambda run: run.flops)
        _draw_method(axes, runs, label=method, marker=_MARKERS[number % len(_MARKERS)], size=size)
    axes.set_xlabel(f"{unit} of a prefill, mean")
    axes.set_ylabel(f"{report.data.metric} accuracy, % (95 % interval)")
    axes.set_title(f"{report.data.name}, {report.data.compared} questions")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=_DOTS_PER_INCH)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"--plot {path}: cannot be written ({error.strerror}); choose another name") from None
    finally:
        partial.unlink(missing_ok=True)


def _draw_method(axes: Any, runs: list[RunReport], *, label: str, marker: str, size: float) -> None:
    accuracies = [100 * run.accuracy.value for run in runs]
    bounds = [[100 * end for end in run.accuracy.interval_95] for run in runs]
    below = [max(0.0, value - low) for value, (low, _) in zip(accuracies, bounds)]
    above = [max(0.0, high - value) for value, (_, high) in zip(accuracies, bounds)]
    axes.errorbar(
        [run.flops / size for run in runs],
        accuracies,
        yerr=(below, above),
        marker=marker,
        markersize=5,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )
