"""A plot of accuracy by confidence for each run: on the diagonal, probabilities are what they say."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from trio_edge.runtime.bundle.errors import install_command
from trio_edge.runtime.bundle.files import check_outputs

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.evaluate.comparison import EvaluationReport

_LARGEST_POINT = 400.0  # square points, for a bin with all questions


def check_plot(path: Path, *, decide: bool) -> None:
    """Raise UsageError unless the plot can be drawn and written."""
    if not decide or path.suffix.lower() != ".svg":
        got = f"{path.name!r}" if decide else "no --decide"
        raise click.UsageError(f"--reliability: expected a .svg file and --decide, got {got}; correct it")
    if find_spec("matplotlib") is None:
        raise click.UsageError(
            f"--reliability: expected matplotlib to be installed, got none; run {install_command('profile')}"
        )
    check_outputs({"--reliability": path})


def reliability_svg(report: EvaluationReport) -> bytes:
    """Return the plot as SVG; a point's area is the share of the questions in its bin."""
    from matplotlib.figure import Figure  # pyplot would bring windows and state

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1, label="as sure as right")
    for run in report.runs:
        if (found := run.reliability) is not None:
            places = [one.confidence for one in found.bins]
            total = sum(one.questions for one in found.bins)
            accuracy = [one.accuracy for one in found.bins]
            (line,) = axes.plot(
                places, accuracy, label=f"{run.run.label}, error {found.calibration_error:.3f}"
            )
            sizes = [_LARGEST_POINT * one.questions / total for one in found.bins]
            axes.scatter(places, accuracy, sizes, color=line.get_color(), alpha=0.4)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()
