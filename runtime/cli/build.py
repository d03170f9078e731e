"""``trio-build BUNDLE``: builds TensorRT engines, on the target or ahead of time, or prepares graphs for this CPU."""

from __future__ import annotations

import json
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich import progress as rich_progress
from rich.console import Console

from trio_edge.runtime.bundle.errors import BackendError, install_command, printable
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.console import EXIT_USER_ERROR, run
from trio_edge.runtime.cli.interruption import interruptible
from trio_edge.runtime.cli.tables import profile_list, whole_table, wide_console
from trio_edge.runtime.engines.build import (
    BuildOptions,
    BuildProgress,
    PlannedGraph,
    build_engines,
    plan_build,
)
from trio_edge.runtime.engines.files import ENGINES_FOLDER
from trio_edge.runtime.engines.needs import build_needs, in_words
from trio_edge.runtime.engines.package import ENGINES_BACKENDS_HELP

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest
    from trio_edge.runtime.engines.files import EngineEntry, EngineSet


@click.command("trio-build", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", metavar="NAME", help=ENGINES_BACKENDS_HELP)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="N,N,…",
    help="Compute capabilities to build for, such as 86,89; other GPUs than this machine's need tensorrt-rtx."
    " [default: this machine's]",
)
@click.option(
    "--graphs", multiple=True, metavar="NAME,…", help="Graphs to build; may be repeated. [default: all]"
)
@click.option(
    "--split-lm-head",
    type=int,
    metavar="N",
    help="Number of blocks that the lm_head is split into; small Jetsons need 4. [default: 1]",
)
@click.option(
    "--verbose-layers", is_flag=True, default=None, help="Keep layer names and shapes, for profiling."
)
@click.option("--dry-run", is_flag=True, help="Print what would be built and what it needs; build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the report of --dry-run as JSON.")
@click.option("--force", is_flag=True, default=None, help="Replace existing engines.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    bundle: Path,
    capabilities: str | None,
    graphs: tuple[str, ...],
    verbose_layers: bool | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> int:
    """Build the TensorRT engines of BUNDLE into BUNDLE/engines/TARGET.

    With --backend onnxruntime, prepare the graphs for this machine's CPU instead. Prepared graphs load several times
    faster, and their weights stay on disk until they are read.
    """
    chosen = {name: value for name, value in settings.items() if value is not None}
    console = Console(stderr=True, quiet=quiet)
    if chosen.get("backend") == "onnxruntime":
        given = {"--compute-capability": capabilities, "--graphs": graphs, "--verbose-layers": verbose_layers}
        given |= {"--dry-run": dry_run, "--split-lm-head": settings["split_lm_head"]}
        return _prepare_for_cpu(bundle, given, console, force=bool(settings["force"]))
    options = BuildOptions(
        compute_capabilities=() if capabilities is None else _capabilities(capabilities),
        graphs=tuple(name.strip() for text in graphs for name in text.split(",")),
        detailed_layers=bool(verbose_layers),
        **chosen,
    )
    if as_json and not dry_run:
        raise click.UsageError("--json: expected --dry-run as well, got none; add it, or read engines.json")
    opened = open_bundle(bundle)
    if dry_run:
        return _report(build_needs(opened, options), opened.manifest, as_json=as_json)
    plan = plan_build(opened, options)
    for text in plan.warnings:
        _warn(text)
    with interruptible() as check, _bars(console, count=len(plan.graphs), check_interrupt=check) as progress:
        engine_set = build_engines(plan, progress=progress)
    print(printable(_summary(engine_set, plan.folder)))
    return 0


def _prepare_for_cpu(bundle: Path, given: dict[str, Any], console: Console, *, force: bool) -> int:
    if odd := next((name for name, value in given.items() if value), None):
        rule = "expected --backend tensorrt or tensorrt-rtx, got onnxruntime"
        raise click.UsageError(f"{odd}: {rule}; remove the option")
    if find_spec("onnxruntime") is None:
        remedy = f"run {install_command('ort')}"
        raise BackendError(f"backend: expected onnxruntime to be installed, it is not; {remedy}")
    from trio_edge.runtime.engines.cpu import CPU_TARGET, prepare_graphs

    opened = open_bundle(bundle)
    target = opened.folder / ENGINES_FOLDER / CPU_TARGET
    if target.exists() and not force:
        raise BackendError(
            f"{target}: expected no prepared graphs yet, got some; add --force to replace them"
        )
    with interruptible() as check:

        def started(spec: GraphSpec) -> None:
            check()
            _tell(console, f"{spec.name}: {_gb(spec.weight_bytes)} of weights")

        prepare_graphs(opened, started=started)
    num_bytes = sum(file.stat().st_size for file in target.iterdir())
    print(printable(f"{target}: graphs for this CPU, {num_bytes / 1e6:.1f} MB"))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _capabilities(text: str) -> tuple[int, ...]:
    """Return the compute capabilities in "86,89" or "8.6,8.9"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", part) for part in parts):
        raise click.UsageError(
            f"--compute-capability: expected numbers separated by commas, got {text!r}; write for instance 86,89"
        )
    return tuple(int(part.replace(".", "")) for part in parts)


def _tell(console: Console, text: str) -> None:
    console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


def _warn(text: str) -> None:
    _tell(Console(stderr=True), f"trio-build: warning: {text}")


def _report(needs: dict[str, Any], manifest: Manifest, *, as_json: bool) -> int:
    """Print what a build needs and whether it can start; return the exit code."""
    if as_json:
        print(json.dumps(needs, indent=1))
    else:
        table = whole_table("graph", "profiles", "weights MB", "engine MB", "peak memory MB")
        for graph in needs["graphs"]:
            sizes = (f"{graph[name] / 1e6:.1f}" for name in ("weight_bytes", "engine_bytes", "peak_bytes"))
            table.add_row(graph["name"], profile_list(manifest.graph(graph["name"])), *sizes)
        wide_console().print(table)
        for name, text in _lines(needs).items():
            print(printable(f"{name:14}{text}"))
        for text in needs["warnings"]:
            _warn(text)
    for text in needs["problems"]:
        print(f"trio-build: {printable(text)}", file=sys.stderr)
    return EXIT_USER_ERROR if needs["problems"] else 0


def _lines(needs: dict[str, Any]) -> dict[str, str]:
    """Return the report's lines by name."""
    gpu, kept, seconds = needs["gpu"], ", ".join(needs["kept"]), needs["seconds"]
    packages = (f"{name} {version or 'not installed'}" for name, version in needs["tensorrt"].items())
    hardware = "none"
    if gpu is not None:
        capability = f"compute capability {gpu['compute_capability'] / 10:.1f}"
        hardware = f"{gpu['name']}, {capability}, {gpu['memory_bytes'] / 1e9:.1f} GB, driver {gpu['driver']}"
    note = " for one compute capability, on two CPUs"
    if needs["backend"] == "tensorrt":
        note = " plus the timing of tactics on the GPU, which is not known"
    memory = f"peak about {_gb(needs['peak_bytes'])}, including {_gb(needs['mapped_bytes'])} of mapped files"
    if needs["available_bytes"] is not None:
        memory += f"; {_gb(needs['available_bytes'])} are available"
    verdict = f"cannot be built here: {_count(len(needs['problems']), 'problem')}, below"
    if needs["ready"]:
        warned = f", with {_count(len(needs['warnings']), 'warning')}" if needs["warnings"] else ""
        verdict = f"ready{warned}; run {needs['command']}"
    run_bytes, release = needs["run_bytes"], needs["l4t"]
    jetson = "" if release is None else f", Jetson Linux {release}"
    return {
        "machine": f"{needs['platform']}, Python {needs['python']}{jetson}",
        "TensorRT": ", ".join(packages),
        "GPU": hardware,
        "built for": ", ".join(f"sm{number}" for number in needs["compute_capabilities"]) or "nothing",
        "folder": f"{needs['folder'] or 'none'}{f' (keeps {kept})' if kept else ''}",
        "time": f"about {f'{seconds} s' if seconds < 90 else f'{seconds / 60:.0f} min'}{note}",
        "disk": f"about {_gb(needs['disk_bytes'])}; {_gb(needs['free_disk_bytes'])} are free",
        "memory": memory,
        "to run": f"about {_gb(sum(run_bytes.values()))} on the device ({in_words(run_bytes)})",
        "verdict": verdict,
    }


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


@contextmanager
def _bars(console: Console, *, count: int, check_interrupt: Callable[[], None]) -> Iterator[BuildProgress]:
    """Yield callbacks that show one bar for the graphs and one for TensorRT's phase, and check for Ctrl-C."""
    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
    )
    is_hidden = not console.is_terminal
    with rich_progress.Progress(*columns, console=console, transient=True, disable=is_hidden) as bars:
        graphs, phases = bars.add_task("", total=count), bars.add_task("", total=None)

        def graph(planned: PlannedGraph) -> None:
            spec, peak = planned.spec, planned.peak_bytes / 1e9
            text = f"{_gb(spec.weight_bytes)} of weights, needs about {peak:.1f} GB of memory"
            _tell(console, f"{spec.name}: {text}")
            bars.update(graphs, description=spec.name)
            bars.reset(phases, description="loading TensorRT")

        def report(message: dict[str, Any]) -> None:
            check_interrupt()
            if message["kind"] == "phase":
                bars.reset(phases, description=message["name"], total=message["num_steps"])
            elif message["kind"] == "step":
                bars.update(phases, completed=message["step"] + 1)

        def done(entry: EngineEntry) -> None:
            check_interrupt()
            bars.advance(graphs)
            peak = entry.peak_memory_bytes
            memory = "" if peak is None else f", peak memory {_gb(peak)}"
            size = f"{entry.num_bytes / 1e6:.1f} MB"
            _tell(console, f"  {entry.graph}: {size} in {entry.build_seconds:.1f} s{memory}")

        yield BuildProgress(graph=graph, report=report, done=done, warn=_warn)


def _summary(engine_set: EngineSet, folder: Path) -> str:
    names = ", ".join(f"sm{number}" for number in engine_set.compute_capabilities)
    return (
        f"{folder}: {_count(len(engine_set.engines), 'engine')}, {engine_set.num_bytes / 1e6:.1f} MB,"
        f" {engine_set.backend} {engine_set.tensorrt_version}, {names}"
    )
