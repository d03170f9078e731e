"""What building engines costs at full size: time, peak memory and size of each graph's engine, by tensorrt-rtx without a GPU.

    python benchmarks/build_scale.py --family llava-next-7b --folder /tmp/scale

The checkpoint is that of released_shapes.py: a released model's shapes and random weights. It is deleted when the bundle is
there, so free space for two copies of the weights is needed. "Anonymous" memory is what a process cannot give back;
"mapped" are the weight files, which the system reads again if it takes their pages away.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arguments import errors_in_one_line
from released_shapes import add_options, checkpoint_of
from watched_command import gigabytes, memory_of

from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, BuildProgress, build_engines, plan_build
from trio_edge.runtime.engines.files import ENGINES_FOLDER, EngineEntry

SAMPLE_SECONDS = 0.05


@dataclass
class ChildMemory:
    """Largest memory of this process's children since the last ``forget``, in bytes."""

    anonymous: int = 0
    mapped: int = 0
    resident: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> ChildMemory:
        threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def forget(self) -> None:
        """Begin again."""
        self.resident = self.anonymous = self.mapped = 0

    def _sample(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            for child in multiprocessing.active_children():
                found = memory_of(child.pid or 0)
                if found is not None:
                    self.resident, self.anonymous, self.mapped = map(
                        max, found, (self.resident, self.anonymous, self.mapped)
                    )


def make_bundle(bundle: Path, options: argparse.Namespace) -> None:
    """Make a checkpoint, export it to ``bundle`` and delete the checkpoint."""
    with checkpoint_of(options) as checkpoint:
        code = "import sys; from trio_edge.export.cli import main; sys.exit(main())"
        arguments = [str(checkpoint), "--out", str(bundle), "--quiet", *options.export]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def row(plan: BuildPlan, entry: EngineEntry, memory: ChildMemory) -> str:
    graph = next(graph for graph in plan.graphs if graph.spec.name == entry.graph)
    layers = f" ({graph.spec.num_layers})" if graph.spec.num_layers else ""
    sizes = graph.spec.weight_bytes, entry.num_bytes
    return (
        f"| {entry.graph}{layers} | {len(entry.profiles)} | {gigabytes(sizes[0])} | {gigabytes(sizes[1])}"
        f" | {sizes[1] / sizes[0]:.3f} | {entry.build_seconds:.1f} s"
        f" | {gigabytes(max(memory.resident, entry.peak_memory_bytes or 0))}"
        f" | {gigabytes(memory.anonymous)} | {gigabytes(memory.mapped)} | {gigabytes(graph.memory.peak_bytes)} |"
    )


def report(bundle: Path, options: argparse.Namespace) -> None:
    opened = open_bundle(bundle)
    capabilities = tuple(int(number) for number in options.compute_capability.split(","))
    chosen: dict[str, Any] = {"graphs": tuple(options.graphs), "split_lm_head": options.split_lm_head}
    plan = plan_build(opened, BuildOptions(compute_capabilities=capabilities, force=True, **chosen))
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"{options.family}, {opened.manifest.dimensions.num_layers} decoder layers, {opened.manifest.dtype};"
        f" {plan.tensorrt.backend} {plan.tensorrt.version} for {options.compute_capability}, {os.cpu_count()} CPUs"
        f" ({model[1] if model else platform.machine()}), Python {platform.python_version()}\n"
    )
    print(
        "| graph (layers) | profiles | weights | engine | ratio | time | peak memory | anonymous | mapped | estimate |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    start = time.perf_counter()
    with ChildMemory() as memory:
        progress = BuildProgress(
            graph=lambda _graph: memory.forget(),
            done=lambda entry: print(row(plan, entry, memory), flush=True),
            warn=lambda text: print(f"warning: {text}", file=sys.stderr, flush=True),
        )
        engine_set = build_engines(plan, progress=progress)
    weights = sum(graph.spec.weight_bytes for graph in plan.graphs)
    print(
        f"\n{len(engine_set.engines)} engines, {gigabytes(engine_set.num_bytes)} for {gigabytes(weights)} of weights"
        f" ({engine_set.num_bytes / opened.manifest.model_bytes:.3f} times the model), {time.perf_counter() - start:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, family="llava-next-7b", folder="out/build-scale")
    parser.add_argument("--compute-capability", default="86", help="as trio-build's")
    parser.add_argument("--graphs", nargs="*", default=[], help="graphs to build (default: all)")
    parser.add_argument("--split-lm-head", type=int, default=1, help="as trio-build's")
    parser.add_argument("--export", nargs=argparse.REMAINDER, default=[], help="the rest goes to trio-export")
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
