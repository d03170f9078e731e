"""Time and memory of an export at full size, and of single graphs of the bundle.

    python benchmarks/export_scale.py --family llava-next-7b --folder /tmp/scale

Makes a checkpoint with the names, shapes, shards and files of a released one and random weights, written piece by piece. Then
runs, each in its own process: a plain copy of the weight files for comparison, ``trio-export``, and single graphs of the bundle
in ONNX Runtime. Before each of them the checkpoint is dropped from the page cache. This needs disk space for three copies of
the weights; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from parts.arguments import parser_for
from parts.graph_inputs import inputs_for
from parts.released_shapes import add_options, checkpoint_of
from parts.tables import head, row
from parts.watched_command import Peaks, Step, folder_bytes, forget, gigabytes, machine, step_table, watch

from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.bundle.reader import Bundle, open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

STEPS = ("reading", "tracing", "writing", "hashing")  # what trio-export prints when it is not on a terminal


def time_copy(files: list[Path], folder: Path) -> Step:
    """Return the time of one plain copy of ``files``, which is deleted again."""
    forget(files)
    folder.mkdir()
    start, cpu_start = time.perf_counter(), time.process_time()
    for file in files:
        shutil.copyfile(file, folder / file.name)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    shutil.rmtree(folder)
    return Step("a plain copy of the weight files, for comparison", seconds, cpu_seconds)


def time_graph(bundle: Path, name: str, *, mapped: bool, threads: int) -> str:
    """Load and run one graph in its own process; return a row of the table."""
    forget(bundle.rglob("*.safetensors"))
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_run_graph, args=(bundle, name, mapped, threads, writer))
    peaks = Peaks()
    child.start()
    writer.close()
    try:
        with peaks.watching(lambda: [child.pid]):
            rows, weights, load, run = reader.recv()
    except EOFError:
        child.join()
        return row((name, f"ended with exit code {child.exitcode}"))
    child.join()
    return row(
        (
            name,
            "mapped" if mapped else "usual",
            str(rows),
            gigabytes(weights),
            f"{load:.1f} s",
            f"{run:.1f} s",
            *map(gigabytes, (peaks.resident, peaks.anonymous, peaks.mapped)),
        )
    )


def _run_graph(bundle: Path, graph: str, mapped: bool, threads: int, writer: Any) -> None:
    """Load and run ``graph`` with random inputs."""
    opened = open_bundle(bundle)
    name, _, profile = graph.partition(":")
    spec = opened.manifest.graph(name)
    chosen = next(entry for entry in spec.profiles if profile in ("", entry.name))
    spec = spec.part_at(chosen)
    sizes, inputs = chosen.sizes, inputs_for(spec, chosen)
    start = time.perf_counter()
    run = (
        _mapped_session(opened.folder / spec.file, threads)
        if mapped
        else _usual_session(opened, name, chosen.name, threads)
    )
    loaded = time.perf_counter()
    outputs = run(inputs)
    done = time.perf_counter()
    if not all(np.isfinite(values).all() for values in outputs):
        raise SystemExit(f"{name}: the outputs are not finite")
    writer.send((sizes.get("S", sizes.get("B")), spec.weight_bytes, loaded - start, done - loaded))


def _usual_session(
    bundle: Bundle, name: str, profile: str, threads: int
) -> Callable[[dict[str, Any]], Iterable[Any]]:
    from trio_edge.runtime.backends.registry import make_backend
    from trio_edge.runtime.backends.single_graph import SingleGraph

    graphs = make_backend("onnxruntime", threads=threads).load(bundle, [name])
    return lambda inputs: SingleGraph(graphs, name, profile=profile).run(inputs).values()


def _mapped_session(file: Path, threads: int) -> Callable[[dict[str, Any]], Iterable[Any]]:
    """Load a graph so that its weights stay in the file: nothing transposes, converts or packs them beforehand.

    ONNX Runtime has no float16 products on x86. Its extended optimizations convert all weights to float32 in memory when it
    loads a graph; without them each weight is converted when it is used.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(
        file, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    return lambda inputs: session.run(None, inputs)


def conditions(options: argparse.Namespace, num_layers: int, folder: Path) -> str:
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False
    )
    system = found.stdout.strip() or "unknown file system"
    return (
        f"{options.family}, {num_layers} decoder layers, {options.dtype}, {' '.join(options.export)}; {system},"
        f" {machine()}; weight files not in the page cache"
    )


def export_table(steps: list[Step], copy: Step, peaks: Peaks) -> str:
    groups: dict[str, list[Step]] = {}
    for step in steps:
        groups.setdefault("tracing" if step.name.startswith("tracing") else step.name, []).append(step)
    return step_table({**groups, "**all of trio-export**": steps, copy.name: [copy]}, peaks)


def main() -> None:
    parser = parser_for(__doc__)
    add_options(parser, family="llava-next-7b", folder="out/export-scale")
    parser.add_argument("--export", nargs=argparse.REMAINDER, default=[], help="options of trio-export, last")
    parser.add_argument(
        "--graphs",
        nargs="*",
        default=["prefix", "select_1"],
        help="graphs to run, at their smallest profile or as GRAPH:PROFILE",
    )
    parser.add_argument("--sessions", nargs="+", choices=["usual", "mapped"], default=["usual", "mapped"])
    parser.add_argument("--threads", type=int, default=2, help="threads of ONNX Runtime")
    options = parser.parse_args()
    bundle = options.folder / "bundle"
    with checkpoint_of(options, bundle) as checkpoint:
        report(checkpoint, bundle, options)


def report(checkpoint: Path, bundle: Path, options: argparse.Namespace) -> None:
    files = sorted(checkpoint.glob("*.safetensors"))
    if not (bundle / MANIFEST_NAME).exists():
        copy = time_copy(files, options.folder / "copy")
        forget(files)
        arguments = [str(checkpoint), "--out", str(bundle), *options.export]
        steps, peaks = watch("trio_edge.export.cli", arguments, is_step=lambda line: line.startswith(STEPS))
        manifest = open_bundle(bundle).manifest
        source, target = folder_bytes(checkpoint), folder_bytes(bundle)
        print(conditions(options, manifest.dimensions.num_layers, bundle))
        print(export_table(steps, copy, peaks))
        print(
            f"checkpoint {gigabytes(source)}, bundle {gigabytes(target)} ({target / source:.4f}x)\n",
            flush=True,
        )
    if options.graphs:
        times, sizes = ("load", "first run"), ("peak memory", "anonymous", "mapped")
        print(*head(("graph", "session", "rows", "weights", *times, *sizes)), sep="\n")
    for name in options.graphs:
        for session in options.sessions:
            print(time_graph(bundle, name, mapped=session == "mapped", threads=options.threads), flush=True)


if __name__ == "__main__":
    main()
