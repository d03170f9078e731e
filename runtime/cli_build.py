"""``trio-build BUNDLE``: the bundle's TensorRT engines, on the target or ahead of time."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from trio_edge.runtime.bundle import open_bundle
from trio_edge.runtime.command_line import run
from trio_edge.runtime.engine_build import (
    BuildOptions,
    BuildPlan,
    BuildProgress,
    PlannedGraph,
    build_engines,
    plan_build,
    planned_graphs,
)
from trio_edge.runtime.engine_host import available_memory_bytes
from trio_edge.runtime.engine_package import ENGINES_BACKENDS_HELP
from trio_edge.runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trio_edge.runtime.bundle import Bundle
    from trio_edge.runtime.engines import EngineEntry, EngineSet


@click.command("trio-build", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", metavar="NAME", help=ENGINES_BACKENDS_HELP)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="N,N,…",
    help="GPUs to build for ahead of time, tensorrt-rtx only: 86,89,120. [default: this machine's]",
)
@click.option("--graphs", multiple=True, metavar="NAME,…", help="Build only these graphs; may be repeated.")
@click.option(
    "--split-lm-head",
    type=int,
    metavar="N",
    help="Cut the lm_head's product into N blocks, for small Jetsons.",
)
@click.option(
    "--verbose-layers", is_flag=True, default=None, help="Keep layer names and shapes, for profiling."
)
@click.option("--dry-run", is_flag=True, help="Print what would be built and what it takes; build nothing.")
@click.option("--force", is_flag=True, default=None, help="Replace existing engines.")
@click.option("--quiet", is_flag=True, help="No progress display.")
def command(
    bundle: Path,
    capabilities: str | None,
    graphs: tuple[str, ...],
    verbose_layers: bool | None,
    dry_run: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Build the TensorRT engines of BUNDLE into BUNDLE/engines/TARGET."""
    chosen = {name: value for name, value in settings.items() if value is not None}
    options = BuildOptions(
        compute_capabilities=() if capabilities is None else _capabilities(capabilities),
        graphs=tuple(name for text in graphs for name in text.split(",")),
        detailed_layers=bool(verbose_layers),
        **chosen,
    )
    opened = open_bundle(bundle)
    if dry_run:
        _print_plan(opened, options)
        return 0
    plan = plan_build(opened, options)
    console = Console(stderr=True, quiet=quiet)
    for text in plan.warnings:
        _warn(text)
    with _bars(console, count=len(plan.graphs)) as progress:
        engine_set = build_engines(plan, progress=progress)
    print(_summary(engine_set, plan.folder))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _capabilities(text: str) -> tuple[int, ...]:
    """Return compute capabilities written as 86,89 or 8.6,8.9."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", part) for part in parts):
        raise click.UsageError(
            f"--compute-capability: expected numbers with commas between, got {text!r}; for instance 86,89"
        )
    return tuple(int(part.replace(".", "")) for part in parts)


def _warn(text: str) -> None:
    Console(stderr=True).print(f"trio-build: warning: {text}", soft_wrap=True, markup=False, highlight=False)


def _print_plan(bundle: Bundle, options: BuildOptions) -> None:
    """Print what would be built; where that is impossible, first what it would take.

    Raises:
        BackendError: If it is impossible.
    """
    try:
        plan = plan_build(bundle, options)
    except BackendError:
        count = max(1, len(options.compute_capabilities))
        _print_graphs(planned_graphs(bundle, options.graphs, num_architectures=count))
        raise
    _print_graphs(plan.graphs)
    for name, text in _plan_lines(plan).items():
        print(f"{name:14}{text}")
    for text in plan.warnings:
        _warn(text)


def _plan_lines(plan: BuildPlan) -> dict[str, str]:
    gpu, available = plan.host.gpu, available_memory_bytes()
    free = shutil.disk_usage(plan.bundle.folder).free
    weights = sum(graph.spec.weight_bytes for graph in plan.graphs)
    kept = ", ".join(entry.graph for entry in plan.kept)
    return {
        "backend": f"{plan.tensorrt.backend} {plan.tensorrt.version}",
        "GPU": "none" if gpu is None else f"{gpu.name}, {gpu.memory_bytes / 1e9:.1f} GB, driver {gpu.driver}",
        "built for": ", ".join(f"sm{number}" for number in plan.compute_capabilities),
        "folder": str(plan.folder) + (f" (keeps {kept})" if kept else ""),
        "disk": f"about {plan.disk_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
        "memory": f"peak about {plan.peak_bytes / 1e9:.2f} GB"
        + ("" if available is None else f", {available / 1e9:.2f} GB are available"),
        "to run": f"{weights / 1e9:.2f} GB of weights and {plan.bundle.manifest.kv_bytes / 1e9:.2f} GB of KV caches,"
        " activations and TensorRT's own memory besides",
    }


def _print_graphs(graphs: tuple[PlannedGraph, ...]) -> None:
    table = Table("graph", "profiles", "weights MB", "engine MB", "peak memory MB")
    for graph in graphs:
        profiles = ", ".join(
            f"{profile.name}({' '.join(f'{symbol}={size}' for symbol, size in profile.sizes.items())})"
            for profile in graph.spec.profiles
        )
        sizes = (graph.spec.weight_bytes, graph.memory.engine_bytes, graph.memory.peak_bytes)
        table.add_row(graph.spec.name, profiles, *(f"{size / 1e6:.1f}" for size in sizes))
    Console().print(table)


@contextmanager
def _bars(console: Console, *, count: int) -> Iterator[BuildProgress]:
    """Yield functions that show a bar for the graphs and one for TensorRT's current phase."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        graphs, phases = bars.add_task("", total=count), bars.add_task("", total=None)

        def graph(planned: PlannedGraph) -> None:
            peak = planned.memory.peak_bytes / 1e9
            text = f"{planned.spec.name}: {planned.spec.weight_bytes / 1e9:.2f} GB of weights, needs about {peak:.1f} GB of memory"
            bars.update(graphs, description=text)
            bars.reset(phases, description="loading TensorRT")
            if not console.is_terminal:
                console.print(text, soft_wrap=True, highlight=False)

        def report(message: dict[str, Any]) -> None:
            if message["kind"] == "phase":
                bars.reset(phases, description=message["name"], total=message["num_steps"])
            elif message["kind"] == "step":
                bars.update(phases, completed=message["step"] + 1)

        def done(entry: EngineEntry) -> None:
            bars.advance(graphs)
            if not console.is_terminal:
                console.print(f"  {_facts(entry)}", soft_wrap=True, highlight=False)

        yield BuildProgress(graph=graph, report=report, done=done, warn=_warn)


def _facts(entry: EngineEntry) -> str:
    peak = "" if entry.peak_memory_bytes is None else f", peak memory {entry.peak_memory_bytes / 1e9:.2f} GB"
    return f"{entry.graph}: {entry.num_bytes / 1e6:.1f} MB in {entry.build_seconds:.1f} s{peak}"


def _summary(engine_set: EngineSet, folder: Path) -> str:
    names = ", ".join(f"sm{number}" for number in engine_set.compute_capabilities)
    return (
        f"{folder}: {len(engine_set.engines)} engines, {engine_set.num_bytes / 1e6:.1f} MB,"
        f" {engine_set.backend} {engine_set.tensorrt_version}, {names}"
    )
