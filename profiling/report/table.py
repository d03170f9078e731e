"""A profile as tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape

from trio_edge.profiling.statistics import Distribution, in_brackets
from trio_edge.runtime.cli.tables import print_table, whole_table, wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from trio_edge.profiling.report.profile import BundleProfile, Comparison, ProfileReport

_SHOWN_LAYERS = 10


def print_profile(report: ProfileReport) -> None:
    """Print the report to standard output."""
    console = wide_console()
    for line in _heading(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _print_summary(console, report)
    for comparison in report.comparisons:
        console.print(_comparison_table(comparison))
    if any(bundle.decode for bundle in report.bundles):
        console.print(_context_table(report.bundles))
    for bundle in report.bundles:
        _print_graphs(console, bundle)
        console.print(_memory_line(bundle), highlight=False, soft_wrap=True)
        for line in bundle.advice:
            console.print(f"[bold]what to change[/] {escape(line)}", highlight=False, soft_wrap=True)
        if bundle.layers:
            console.print(_layer_table(bundle))
    for line in report.conditions.missing:
        console.print(f"not measured: {line}", highlight=False, markup=False, soft_wrap=True)


def _heading(report: ProfileReport) -> list[str]:
    device, conditions = report.device, report.conditions
    lines = [
        f"{device.name}, {device.cores} cores{f', {device.gpu}' if device.gpu else ''}; {conditions.backend},"
        f" graphs timed by {conditions.clock}"
        + (f"; power mode {conditions.power_mode}" if conditions.power_mode else ""),
        (
            f"{conditions.runs} runs in turns ({conditions.stopped}) after {conditions.warm_up} warm-up answers;"
            f" {conditions.image}, {conditions.new_tokens} new tokens"
        ),
    ]
    if report.ceilings is not None:
        ceilings = report.ceilings
        lines.append(
            f"measured peak rates: {ceilings.flops_per_s / 1e9:.1f} GFLOP/s ({ceilings.matmul}),"
            f" {ceilings.bytes_per_s / 1e9:.1f} GB/s (copy of {ceilings.copy})"
        )
    return lines


def _print_summary(console: Console, report: ProfileReport) -> None:
    rows = [
        (
            escape(bundle.label),
            str(bundle.visual_tokens),
            f"{bundle.processed_tokens:.1f}",
            with_interval(bundle.ttft_ms),
            f"{bundle.ttft_ms.p95:.2f}",
            f"{bundle.ttft_ms.p99:.2f}",
            "-" if bundle.token_ms is None else f"{bundle.token_ms.p50:.2f}",
            "-" if bundle.tokens_per_s is None else f"{bundle.tokens_per_s:.1f}",
            f"{bundle.load.open_ms + bundle.load.graphs_ms:.0f}",
            ", ".join(f"{escape(where)} {value:.3g}" for where, value in bundle.energy_j.items()) or "-",
        )
        for bundle in report.bundles
    ]
    headers = (
        "bundle", "tokens in", "processed", "first token ms", "p95", "p99", "token ms", "tokens/s", "first load ms",
        "J per answer",
    )  # fmt: skip
    print_table(console, headers, rows, less=("tokens in", "processed", "p95", "p99", "first load ms"))


def with_interval(values: Distribution) -> str:
    """Return the median and its interval: ``25.31 (25.10 – 25.52)``."""
    return f"{values.p50:.2f}{in_brackets(values.interval_95, '.2f')}"


def _context_table(bundles: Sequence[BundleProfile]) -> Table:
    table = whole_table("bundle", "context", "rows in caches", "token ms", title="a token by context")
    for bundle in bundles:
        for step in bundle.decode:
            table.add_row(
                escape(bundle.label), str(step.context), f"{step.cached_rows:.1f}", with_interval(step.ms)
            )
        table.add_row("", "", "fit", bundle.decode_fit.words if bundle.decode_fit else "-", end_section=True)
    return table


def _comparison_table(comparison: Comparison) -> Table:
    table = whole_table(
        "quantity", "ratio", "95 %", title=escape(f"{comparison.label} divided by {comparison.reference}")
    )
    for name, ratio in comparison.ratios.items():
        table.add_row(name, f"{ratio.value:.3f}", in_brackets(ratio.interval_95, ".3f").strip(" ()"))
    for name, value in comparison.sizes.items():
        table.add_row(escape(name), f"{value:.3f}", "")
    return table


def _print_graphs(console: Console, bundle: BundleProfile) -> None:
    rows: list[tuple[str, ...]] = [
        (
            escape(graph.name),
            escape(graph.profile),
            f"{graph.calls_per_answer:.0f}",
            f"{graph.call_ms.p50:.3f}",
            f"{graph.call_ms.p95:.3f}",
            f"{graph.call_ms.spread:.3f}",
            f"{100 * graph.share:.1f} %",
            "-" if graph.flops_per_s is None else f"{graph.flops_per_s / 1e9:.1f}",
            "-" if graph.bytes_per_s is None else f"{graph.bytes_per_s / 1e9:.2f}",
            graph.verdict or "-",
        )
        for graph in bundle.graphs
    ]
    first = bundle.host_first_ms
    rows.append(("outside", "prefill", "", f"{first.p50:.3f}", f"{first.p95:.3f}"))
    if bundle.host_token_ms is not None:
        rows.append(("outside", "decode", "", f"{bundle.host_token_ms:.3f}"))
    headers = (
        "graph", "profile", "calls", "ms", "p95", "spread", "of answer", "GFLOP/s", "GB/s", "roofline",
    )  # fmt: skip
    title = escape(f"{bundle.label}: {bundle.numbers}; {bundle.selection}")
    print_table(console, headers, rows, title=title, less=("calls", "p95", "spread", "GFLOP/s", "GB/s"))


def _memory_line(bundle: BundleProfile) -> str:
    memory = bundle.memory
    parts = {**memory.parts, "peak of the process": memory.peak_rss}
    text = ", ".join(f"{name} {count / 1e6:.1f}" for name, count in parts.items() if count is not None)
    return f"[bold]memory MB[/] {text}; KV rows in use {memory.kv_used / 1e6:.2f}"


def _layer_table(bundle: BundleProfile) -> Table:
    table = whole_table("graph", "phase", "layer", "kind", "ms per answer", title="slowest layers")
    for layer in sorted(bundle.layers, key=lambda one: -one.answer_ms)[:_SHOWN_LAYERS]:
        cells = (layer.graph, layer.phase, layer.name, layer.kind, f"{layer.answer_ms:.3f}")
        table.add_row(*map(escape, cells))
    return table
