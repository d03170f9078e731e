"""An evaluation's report as tables, and as a plot of accuracy against FLOPs with one line per method."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from trio_edge.profiling.page.figures import LIGHT, check_matplotlib, colour, figure_style, new_figure
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.tables import whole_table, wide_console

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

    from trio_edge.calibration.evaluate.comparison import (
        AgainstReference,
        Estimate,
        EvaluationReport,
        RunReport,
    )


def print_report(report: EvaluationReport) -> None:
    """Print the report to standard output."""
    console = wide_console()
    console.print(_accuracy_table(report))
    console.print(_cost_table(report))
    if report.data.metric == "yes-no":
        console.print(_yes_no_table(report))
    if len(report.runs[0].by_kind) > 1:
        console.print(_kind_table(report))
    data, conditions = report.data, report.conditions
    console.print(
        f"{data.name}: {data.compared} of {data.questions} questions, metric {data.metric}; {conditions.backend},"
        f" {conditions.workers} x {conditions.threads} threads; 95 % intervals",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def per_cent(estimate: Estimate, *, signed: bool = False) -> str:
    """Return value and interval in per cent: ``91.6 (89.3 – 93.4)``."""
    sign = "+" if signed else ""
    low, high = estimate.interval_95
    return f"{100 * estimate.value:{sign}.1f} ({100 * low:{sign}.1f} – {100 * high:{sign}.1f})"


def flops_unit(largest: float) -> tuple[str, float]:
    """Return the unit to print FLOPs up to ``largest`` in, and its size."""
    for unit, size in (("TFLOPs", 1e12), ("GFLOPs", 1e9)):
        if largest >= size:
            return unit, size
    return "MFLOPs", 1e6


def _accuracy_table(report: EvaluationReport) -> Table:
    table = whole_table("run", "accuracy %", "minus keep-all", "retained %", "same answer %", "KL, nats")
    for run in report.runs:
        table.add_row(escape(run.run.label), per_cent(run.accuracy), *_against(run.against_reference))
    return table


def _against(against: AgainstReference | None) -> tuple[str, str, str, str]:
    if against is None:
        return "", "", "", ""
    return (
        per_cent(against.difference, signed=True),
        "-" if against.retained is None else f"{100 * against.retained:.1f}",
        f"{100 * against.agreement.value:.1f}",
        "-" if against.first_token_kl is None else f"{against.first_token_kl:.4f}",
    )


def _cost_table(report: EvaluationReport) -> Table:
    unit, size = flops_unit(max(run.flops for run in report.runs))
    table = whole_table(
        "run", "tokens in", "kept on average", unit, "fewer", "first token ms", "faster", "tokens/s"
    )
    for run in report.runs:
        against = run.against_reference
        table.add_row(
            escape(run.run.label),
            f"{run.visual_tokens:.1f}",
            f"{run.processed_tokens:.1f} ({100 * run.average_keep:.1f} %)",
            f"{run.flops / size:.2f}",
            "" if against is None else f"{against.flops_ratio:.2f}x",
            f"{run.ttft_ms:.1f}",
            "" if against is None else f"{against.ttft_ratio:.2f}x",
            "-" if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}",
        )
    return table


def _yes_no_table(report: EvaluationReport) -> Table:
    table = whole_table("run", "accuracy %", "precision %", "recall %", "F1 %", "yes %")
    for run in report.runs:
        if (rates := run.yes_no) is not None:
            values = (rates.accuracy, rates.precision, rates.recall, rates.f1, rates.yes_ratio)
            table.add_row(escape(run.run.label), *(f"{100 * value:.1f}" for value in values))
    return table


def _kind_table(report: EvaluationReport) -> Table:
    kinds = list(report.runs[0].by_kind)
    table = whole_table(
        "run", *(f"{escape(kind)} ({report.runs[0].by_kind[kind].questions})" for kind in kinds)
    )
    for run in report.runs:
        table.add_row(escape(run.run.label), *(f"{100 * run.by_kind[kind].value:.1f}" for kind in kinds))
    return table


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
