"""Times every graph on an NVIDIA GPU, next to the whole model and the paper's own code in torch, on the same weights.

    python benchmarks/gpu.py --count                                  # only FLOPs and bytes by count; runs anywhere
    python benchmarks/gpu.py                                          # three 7B models, random weights made on the GPU
    python benchmarks/gpu.py --families llava-next-7b --json out/gpu.json --export out/gpu
    python benchmarks/gpu.py --device cpu --shapes small              # all of it on a CPU, at small sizes, in minutes

Installs nothing. First the packaged model shows which backends run here and give the right answers (--no-parity skips this).
Then the ways to run a model are measured one after the other on the same weights: the whole model in torch (fused attention,
fixed KV buffers, each part a CUDA graph, also with compiled layers), TRIO as in the paper's code, and the graphs of a bundle as
torch modules. With --export FOLDER the weights are stored there as a checkpoint, trio-export makes bundles, trio-build makes
engines if TensorRT runs, and the runtime's backends are measured too; this takes 50 GB of disk at full size. All times are
medians on the device's clock. A way that fails gives a line with the reason. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from gpu_parts.bundles_at_runtime import build_for, measure_bundle
from gpu_parts.ceilings import Ceilings, measure_ceilings
from gpu_parts.count import Counted
from gpu_parts.exported import export_packaged_model, exported_bundle, random_checkpoint
from gpu_parts.graphs_in_torch import GraphsInTorch
from gpu_parts.layers_in_torch import LayersInTorch
from gpu_parts.measure import Measured, measure
from gpu_parts.parity import REFERENCE, Compared, compare
from gpu_parts.prompts import random_picture
from gpu_parts.subjects import BUDGETS, SHAPES, Sizes, Subject, random_subject, sizes_of, subject_of
from gpu_parts.tables import Row, count_tables, measured_table, parity_table
from parts.arguments import parser_for, positive

from trio_edge.export.checkpoints.checkpoint import TINY_FOLDER, read_checkpoint
from trio_edge.runtime.backends.registry import BACKENDS
from trio_edge.runtime.bundle.errors import TrioEdgeError
from trio_edge.runtime.bundle.schedule import Schedule

EXIT_USER_ERROR = 2
_MAX_SHAPES = 64
"""Most sizes that torch compiles one layer for: each range's prefill and decode."""
_PARITY_PICTURE = (96, 96)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and return its exit code."""
    options = _options(argv)
    if options.count:
        print(count_tables(_counted(options)))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "gpu.py: expected an NVIDIA GPU that torch can use, got none; run with --device cpu --shapes small, or --count",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    torch.set_default_device(device)  # the graph modules make their masks where they run
    try:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=_MAX_SHAPES):
            ceilings = measure_ceilings(device, dtype)
            conditions = _conditions(options, device, ceilings)
            print(_as_text(conditions), flush=True)
            compared = [] if options.no_parity else _parity(options, device)
            if compared:
                print(f"\n{parity_table(compared)}\n", flush=True)
            backends = [this.way for this in compared if this.runs and this.way in BACKENDS]
            if device.type == "cpu":
                backends.append(REFERENCE)
            rows = [
                row for family in options.families for row in _family_rows(family, options, device, backends)
            ]
    except TrioEdgeError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    finally:
        torch.set_default_device(None)
    print(f"\n{measured_table(rows, ceilings)}\n")
    for row in rows:
        for note in () if row.measured is None else row.measured.notes:
            print(f"{row.model}, {row.keep:.1%}, {row.way}: {note}")
    if options.json is not None:
        report = {
            "conditions": conditions,
            "parity": [dataclasses.asdict(this) for this in compared],
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))
    return 0 if any(row.measured for row in rows) else 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    families = list(SHAPES["full"])
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", choices=list(SHAPES), default="full", help="small: for a CPU")
    parser.add_argument(
        "--keep",
        type=_percent,
        nargs="+",
        default=[100 * budget for budget in BUDGETS],
        help="average keeps, in %%",
    )
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], help="[default: float16, float32 on a CPU]"
    )
    parser.add_argument("--text", type=positive, default=64, help="text tokens of the prompt")
    parser.add_argument("--repeats", type=positive, default=10, help="timed prefills; medians are printed")
    parser.add_argument("--tokens", type=positive, default=32, help="timed decode steps")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel from Python")
    parser.add_argument("--no-compile", action="store_true", help="do not use torch.compile")
    parser.add_argument("--no-parity", action="store_true", help="do not compare the backends first")
    parser.add_argument(
        "--parity",
        type=Path,
        nargs=2,
        metavar=("CHECKPOINT", "BUNDLE"),
        help="model for this comparison [default: the packaged model]",
    )
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="also measure the runtime's backends")
    parser.add_argument("--count", action="store_true", help="only print FLOPs and bytes by count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    options = parser.parse_args(argv)
    if options.dtype is None:
        options.dtype = "float16" if options.device == "cuda" or options.count else "float32"
    options.keeps = [_keep(percent) for percent in options.keep]
    if 1.0 not in options.keeps:  # what everything is compared with
        options.keeps.insert(0, 1.0)
    return options


def _percent(text: str) -> float:
    percent = float(text.removesuffix("%"))
    if not 0 < percent <= 100:
        raise argparse.ArgumentTypeError(f"expected more than 0 and at most 100 %, got {text}")
    return percent


def _keep(percent: float) -> float:
    """Return the share; a printed 33.3 or 22.2 means a third or two ninths."""
    return next((budget for budget in BUDGETS if abs(100 * budget - percent) < 0.05), percent / 100)


def _counted(options: argparse.Namespace) -> dict[tuple[str, float], Counted]:
    counted = {}
    for family in options.families:
        sizes = sizes_of(SHAPES[options.shapes][family], dtype=options.dtype)
        for keep in options.keeps:
            counted[family, keep] = sizes.count(keep, num_text=options.text)
    return counted


def _parity(options: argparse.Namespace, device: torch.device) -> list[Compared]:
    if options.parity is not None:
        checkpoint, bundle = options.parity
        return compare(
            checkpoint, bundle, picture=random_picture(_PARITY_PICTURE), num_text=24, device=device
        )
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "tiny"
        export_packaged_model(bundle, dtype=options.dtype)
        return compare(
            TINY_FOLDER, bundle, picture=random_picture(_PARITY_PICTURE), num_text=24, device=device
        )


def _family_rows(
    family: str, options: argparse.Namespace, device: torch.device, backends: Sequence[str]
) -> Iterator[Row]:
    """Measure all ways of one model on the same weights."""
    shapes = SHAPES[options.shapes][family]
    if options.export is None:
        subject = random_subject(shapes, num_text=options.text, device=device, dtype=options.dtype)
        yield from _torch_rows(family, subject, options)
        return
    options.export.mkdir(parents=True, exist_ok=True)
    with random_checkpoint(shapes, options.export, dtype=options.dtype) as checkpoint:
        subject = subject_of(
            read_checkpoint(str(checkpoint)),
            picture=random_picture(shapes.picture),
            num_text=options.text,
            device=device,
            dtype=options.dtype,
        )
        sizes = subject.sizes
        yield from _torch_rows(family, subject, options)
        del subject
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the backends do not allocate through torch
        for keep in options.keeps:
            yield from _bundle_rows(family, keep, checkpoint, sizes, options, backends)


def _torch_rows(family: str, subject: Subject, options: argparse.Namespace) -> Iterator[Row]:
    print(f"{family}: {subject.sizes.num_visual} visual and {options.text} text tokens", flush=True)
    for compiled in (False,) if options.no_compile else (False, True):
        for keep in options.keeps:
            for way in (LayersInTorch, GraphsInTorch):
                if compiled and keep < 1.0 and way is LayersInTorch:
                    continue  # autograd and a host loop gain nothing
                torch.compiler.reset()
                schedule = subject.sizes.schedule(keep)
                make = partial(_measured, way, subject, schedule, options, compiled=compiled)
                name = way.name_for(schedule, compiled=compiled)
                yield _row(family, keep, name, make, subject.sizes, options)


def _measured(
    way: type[LayersInTorch] | type[GraphsInTorch],
    subject: Subject,
    schedule: Schedule,
    options: argparse.Namespace,
    *,
    compiled: bool,
) -> Measured:
    return measure(
        way(subject, schedule, max_new_tokens=_room(options), compiled=compiled),
        repeats=options.repeats,
        num_tokens=options.tokens,
        cuda_graphs=not options.no_cuda_graphs,
    )


def _bundle_rows(
    family: str,
    keep: float,
    checkpoint: Path,
    sizes: Sizes,
    options: argparse.Namespace,
    backends: Sequence[str],
) -> Iterator[Row]:
    """Export one bundle and measure it on each backend."""
    picture, num_text = SHAPES[options.shapes][family].picture, options.text
    made = exported_bundle(
        checkpoint,
        sizes.schedule(keep),
        picture=picture,
        num_text=num_text,
        max_new_tokens=_room(options),
        dtype=options.dtype,
    )

    def run(bundle: Path, backend: str) -> Measured:
        build_for(bundle, backend)
        return measure_bundle(
            bundle,
            backend,
            picture=random_picture(picture),
            num_text=num_text,
            repeats=options.repeats,
            num_tokens=options.tokens,
        )

    with ExitStack() as stack:
        try:
            bundle = stack.enter_context(made)
        except RuntimeError as error:  # the rows that are measured already must not be lost
            print(f"  {keep:.1%}: {error}", flush=True)
            return
        for backend in backends:
            yield _row(family, keep, backend, partial(run, bundle, backend), sizes, options)


def _room(options: argparse.Namespace) -> int:
    """Return the new tokens that the caches have room for: timed ones and warm-up."""
    return int(options.tokens) + 8


def _row(
    family: str, keep: float, way: str, run: Callable[[], Measured], sizes: Sizes, options: argparse.Namespace
) -> Row:
    """Return the result of ``run``, or why it failed: for instance memory, or a kernel that this GPU lacks."""
    measured, problem = None, ""
    try:
        measured = run()
        line = f"TTFT {measured.ttft_ms:.1f} ms, {measured.decode_ms:.2f} ms/token"
    except (RuntimeError, MemoryError, TrioEdgeError) as error:
        line = problem = f"failed: {str(error).strip().splitlines()[0]}"
    gc.collect()
    print(f"  {keep:.1%}, {way}: {line}", flush=True)
    counted = sizes.count(keep, num_text=options.text)
    return Row(model=family, keep=keep, counted=counted, measured=measured, way=way, problem=problem)


def _conditions(options: argparse.Namespace, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    conditions: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dtype": options.dtype,
        "shapes": options.shapes,
        "repeats": options.repeats,
        "ceilings": dataclasses.asdict(ceilings),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        conditions["device"] = properties.name
        conditions["compute_capability"] = f"{properties.major}.{properties.minor}"
        conditions["memory_bytes"] = properties.total_memory
        conditions["cuda"] = torch.version.cuda
    return conditions


def _as_text(conditions: dict[str, Any]) -> str:
    ceilings = conditions["ceilings"]
    return (
        f"{conditions['date']}, {conditions['device']}, torch {conditions['torch']}, {conditions['dtype']},"
        f" {conditions['shapes']} shapes, medians of {conditions['repeats']} runs\n"
        f"ceilings: {ceilings['flops_per_s'] / 1e12:.3g} TFLOP/s (product of {ceilings['matmul_size']}² matrices),"
        f" {ceilings['bytes_per_s'] / 1e9:.3g} GB/s (copy of {ceilings['copy_bytes'] / 1e6:.0f} MB)"
    )


if __name__ == "__main__":
    sys.exit(main())
