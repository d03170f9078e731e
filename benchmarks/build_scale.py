"""Time, peak memory and size of each graph's engine at full size, built by tensorrt-rtx without a GPU.

    python benchmarks/build_scale.py --family llava-next-7b --folder /tmp/scale

The checkpoint has a released model's shapes and random weights (parts/released_shapes.py). It is deleted when the bundle is
exported, so this needs disk space for two copies of the weights. "Anonymous" memory cannot be reclaimed; "mapped" memory is
weight files, which the system can drop and read again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from parts.arguments import errors_in_one_line, parser_for
from parts.released_shapes import add_options, checkpoint_of
from parts.tables import head, row
from parts.watched_command import Peaks, gigabytes, machine

from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, BuildProgress, build_engines, plan_build
from trio_edge.runtime.engines.files import ENGINES_FOLDER, EngineEntry


def make_bundle(bundle: Path, options: argparse.Namespace) -> None:
    """Make a checkpoint, export it to ``bundle`` and delete the checkpoint."""
    with checkpoint_of(options) as checkpoint:
        code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
        arguments = [str(checkpoint), "--out", str(bundle), "--quiet", *options.export]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def cells(plan: BuildPlan, entry: EngineEntry, memory: Peaks) -> tuple[str, ...]:
    graph = next(graph for graph in plan.graphs if graph.spec.name == entry.graph)
    layers = f" ({graph.spec.num_layers})" if graph.spec.num_layers else ""
    weights, peak = graph.spec.weight_bytes, max(memory.resident, entry.peak_memory_bytes or 0)
    sizes = (peak, memory.anonymous, memory.mapped, graph.peak_bytes)
    return (
        f"{entry.graph}{layers}",
        str(len(entry.profiles)),
        gigabytes(weights),
        gigabytes(entry.num_bytes),
        f"{entry.num_bytes / weights:.3f}",
        f"{entry.build_seconds:.1f} s",
        *map(gigabytes, sizes),
    )


def report(bundle: Path, options: argparse.Namespace) -> None:
    opened = open_bundle(bundle)
    capabilities = tuple(int(number) for number in options.compute_capability.split(","))
    chosen: dict[str, Any] = {"graphs": tuple(options.graphs), "split_lm_head": options.split_lm_head}
    plan = plan_build(opened, BuildOptions(compute_capabilities=capabilities, force=True, **chosen))
    print(
        f"{options.family}, {opened.manifest.dimensions.num_layers} decoder layers, {opened.manifest.dtype};"
        f" {plan.tensorrt.backend} {plan.tensorrt.version} for {options.compute_capability}, {machine()}\n"
    )
    heads = (
        "graph (layers)", "profiles", "weights", "engine", "ratio", "time", "peak memory", "anonymous", "mapped",
        "estimate",
    )  # fmt: skip
    print(*head(heads), sep="\n", flush=True)
    start = time.perf_counter()
    memory = Peaks()
    with memory.watching(lambda: [child.pid for child in multiprocessing.active_children()]):
        progress = BuildProgress(
            graph=lambda _graph: memory.forget(),
            done=lambda entry: print(row(cells(plan, entry, memory)), flush=True),
            warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        )
        engine_set = build_engines(plan, progress=progress)
    weights = sum(graph.spec.weight_bytes for graph in plan.graphs)
    print(
        f"\n{len(engine_set.engines)} engines, {gigabytes(engine_set.num_bytes)} for {gigabytes(weights)} of weights"
        f" ({engine_set.num_bytes / opened.manifest.model_bytes:.3f} times the model), {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    parser = parser_for(__doc__)
    add_options(parser, family="llava-next-7b", folder="out/build-scale")
    parser.add_argument("--compute-capability", default="86", help="trio-build's option")
    parser.add_argument("--graphs", nargs="*", default=[], help="graphs to build [default: all]")
    parser.add_argument("--split-lm-head", type=int, default=1, help="trio-build's option")
    parser.add_argument("--export", nargs=argparse.REMAINDER, default=[], help="options of trio-export, last")
    options = parser.parse_args()
    bundle = options.folder / "bundle"
    if not bundle.exists():
        make_bundle(bundle, options)
    try:
        with errors_in_one_line(parser):
            report(bundle, options)
    finally:
        shutil.rmtree(bundle / ENGINES_FOLDER, ignore_errors=True)
        if not options.keep_files:
            shutil.rmtree(bundle, ignore_errors=True)


if __name__ == "__main__":
    main()
