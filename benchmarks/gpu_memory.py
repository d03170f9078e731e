"""Models that fit each Jetson: memory to run and to build each model, estimated from its shapes, without weights or a GPU.

    python benchmarks/gpu_memory.py

"Run" is the estimate of ``trio-export --target``: weights with those that stages repeat, KV caches, buffers, workspace.
"Build" is ``trio-build --dry-run``'s estimate of the largest graph's peak, without mapped weight files, which the system can drop.
JetPack's TensorRT 10.3 (6.2) cannot write an engine in pieces, 10.16 (7.2) can. Rows with int4 assume 4-bit blocks for the
decoder's products.
"""

from __future__ import annotations

import argparse

from gpu_parts.subjects import SHAPES, Sizes, sizes_of
from parts.arguments import parser_for
from parts.tables import markdown, percent

from trio_edge.export.check.fit import INT4_SHARE, Fit, FitImage, FitInputs, estimate
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.engines.build import planned_graph
from trio_edge.trio.cost.devices import DEVICES
from trio_edge.trio.cost.memory import tiles_of
from trio_edge.trio.cost.work import layer_weights

_KEEPS = (1.0, 0.111)
_UNLIMITED = 1 << 62


def fit_inputs(sizes: Sizes, schedule: Schedule, options: argparse.Namespace, *, int4: bool) -> FitInputs:
    return FitInputs(
        decoder=sizes.decoder,
        element_bytes=sizes.element_bytes,
        vision_params=sizes.vision_weights,
        image=FitImage(
            num_visual=sizes.num_visual,
            tiles=tiles_of(sizes.tower, sizes.vision_sizes),
            pixel_bytes=sizes.pixel_bytes,
        ),
        schedule=schedule,
        max_text=options.max_text,
        max_new_tokens=options.max_new_tokens,
        quantize=parse_plan("all=int4" if int4 else "none"),
    )


def build_peak(sizes: Sizes, schedule: Schedule, *, int4: bool, streams_engines: bool) -> int:
    """Return the peak memory to build the graph with the most weights."""
    starts = [0, *(stage.layer for stage in schedule.stages), sizes.decoder.num_layers]
    most = max(stop - start for start, stop in zip(starts, starts[1:]))
    share = INT4_SHARE if int4 else 1.0
    weights = round(most * layer_weights(sizes.decoder) * sizes.element_bytes * share)
    spec = GraphSpec(
        name="", role="suffix", file="", inputs=(), outputs=(), weight_bytes=weights,
        profiles=(Profile(name="decode", sizes={}),),
    )  # fmt: skip
    graph = planned_graph(spec, backend="tensorrt", streams_engines=streams_engines, num_architectures=1)
    return graph.peak_bytes - graph.mapped_bytes


def fits_on(run: Fit, peaks: tuple[int, int]) -> str:
    """Return the Jetsons on which the model runs, and whether building needs more memory than they have."""
    cells = []
    for target in DEVICES.values():
        if not target.name.startswith("jetson") or run.total_bytes > target.usable_bytes:
            continue
        name = target.name.removeprefix("jetson-")
        unbuildable = [
            release for release, peak in zip(("10.3", "10.16"), peaks) if peak > target.usable_bytes
        ]
        cells.append(name + (f" (cannot build with {' or '.join(unbuildable)})" if unbuildable else ""))
    return ", ".join(cells) or "none"


def rows(options: argparse.Namespace) -> list[tuple[str, ...]]:
    found = []
    for family, shapes in SHAPES["full"].items():
        sizes = sizes_of(shapes, dtype="float16")
        for keep in _KEEPS:
            for int4 in (False, True):
                schedule = sizes.schedule(keep)
                run = estimate(fit_inputs(sizes, schedule, options, int4=int4), usable_bytes=_UNLIMITED)
                peaks = tuple(
                    build_peak(sizes, schedule, int4=int4, streams_engines=streams)
                    for streams in (False, True)
                )
                parts = run.parts
                numbers = (
                    parts["decoder weights"],
                    parts["head and vision weights"],
                    parts["repeated weights"],
                    parts["KV caches"],
                    parts["buffers"],
                    parts["workspace"],
                    run.total_bytes,
                    *peaks,
                )
                found.append(
                    (
                        family,
                        percent(keep),
                        "int4" if int4 else "fp16",
                        *(f"{number / 2**30:.2f}" for number in numbers),
                        fits_on(run, (peaks[0], peaks[1])),
                    )
                )
    return found


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--max-text", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()
    heads = (
        "model", "keep", "weights", "decoder weights", "head, vision", "repeated", "KV caches", "buffers", "workspace",
        "**run**", "**build** 10.3", "**build** 10.16", "runs on",
    )  # fmt: skip
    print(f"GiB; {options.max_text} text tokens, {options.max_new_tokens} new ones\n")
    print(markdown(heads, rows(options)))


if __name__ == "__main__":
    main()
