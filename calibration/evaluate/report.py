"""An evaluation's report as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from trio_edge.runtime.bundle.errors import printable
from trio_edge.runtime.cli.tables import whole_table, wide_console

if TYPE_CHECKING:
    from rich.table import Table

    from trio_edge.calibration.evaluate.comparison import AgainstReference, Estimate, EvaluationReport


def print_report(report: EvaluationReport) -> None:
    """Print the report to standard output."""
    console = wide_console()
    console.print(_accuracy_table(report))
    console.print(_cost_table(report))
    if report.data.metric == "yes-no":
        console.print(_yes_no_table(report))
    if report.runs[0].reliability is not None:
        console.print(_reliability_table(report))
    if len(report.runs[0].by_kind) > 1:
        console.print(_kind_table(report))
    data, conditions = report.data, report.conditions
    console.print(
        f"{data.name}: {data.compared} of {data.questions} questions, metric {data.metric}; {conditions.backend},"
        f" threads {conditions.threads}; 95 % intervals",
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


def _reliability_table(report: EvaluationReport) -> Table:
    headers = (
        "Brier",
        "calibration error",
        "log loss",
        "confidence %",
        "minus accuracy",
        "label mass %",
        "changed by order %",
    )
    table = whole_table("run", *headers)
    for run in report.runs:
        if (found := run.reliability) is not None:
            changed = found.changed_by_order
            table.add_row(
                escape(run.run.label),
                f"{found.brier:.4f}",
                f"{found.calibration_error:.4f}",
                f"{found.log_loss:.4f}",
                f"{100 * found.confidence:.1f}",
                f"{100 * (found.confidence - run.accuracy.value):+.1f}",
                f"{100 * found.label_mass:.1f}",
                "-" if changed is None else f"{100 * changed:.1f}",
            )
    return table


def _kind_table(report: EvaluationReport) -> Table:
    kinds = list(report.runs[0].by_kind)
    table = whole_table(
        "run", *(f"{escape(printable(kind))} ({report.runs[0].by_kind[kind].questions})" for kind in kinds)
    )
    for run in report.runs:
        table.add_row(escape(run.run.label), *(f"{100 * run.by_kind[kind].value:.1f}" for kind in kinds))
    return table
