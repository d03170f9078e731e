"""Processor time of every graph of several bundles, on one thread of ONNX Runtime, for machines that run other programs too.

    trio-export tiny --out tiny-100 --keep 100% --dtype float32     # and so on for other keeps
    python benchmarks/bundle_times.py tiny-100 tiny-33.3 tiny-22.2 tiny-11.1

``trio-profile`` measures whole answers by the wall clock, which other programs disturb. Here each graph runs alone on random
inputs, at the largest image and the smallest text bucket. The figures are medians; a decode step reads full KV buffers.
"""

from __future__ import annotations

import functools
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime
from parts.arguments import parser_for
from parts.graph_inputs import inputs_for
from parts.layer_graphs import median_seconds, single_thread_session
from parts.tables import markdown

from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile


def chosen_profile(graph: GraphSpec, phase: str) -> Profile | None:
    """Return the profile for the largest image and the smallest text, or that of a decode step."""
    if phase == "decode":
        return next((entry for entry in graph.profiles if entry.name == "decode"), None)
    prefill = [entry for entry in graph.profiles if entry.name != "decode"]
    return prefill[-1] if graph.role == "vision" else prefill[0]


def measured(folder: Path, manifest: Manifest, *, repeats: int) -> dict[tuple[str, str], tuple[float, float]]:
    """Return milliseconds and GFLOP of every graph, or piece of one, by phase and name."""
    found = {}
    parts = [(graph, part) for graph in manifest.graphs for part in graph.split()]
    for graph, part in parts:
        session = single_thread_session(folder / part.file)
        for phase in ("prefill", "decode"):
            profile = chosen_profile(part, phase)
            if profile is None:
                continue
            run = functools.partial(session.run, None, inputs_for(part, profile))
            seconds = median_seconds(run, repeats=repeats)
            found[phase, part.name] = (1e3 * seconds, graph_work(manifest, graph, profile).flops / 1e9)
    return found


def _place(graph: GraphSpec) -> tuple[float, bool]:
    """Return the sort key of graphs in the order in which they run."""
    ends = {"clip_text": -3.0, "vision": -2.0, "reduce": -1.0, "head": math.inf, "probe": math.inf}
    place = ends[graph.role] if graph.first_layer is None else graph.first_layer
    return place, graph.role not in ("probe", "select")


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=31)
    options = parser.parse_args()
    manifests = [open_bundle(folder).manifest for folder in options.bundles]
    results = [measured(*entry, repeats=options.repeats) for entry in zip(options.bundles, manifests)]
    graphs = sorted((graph for entry in manifests for graph in entry.graphs), key=_place)
    places = dict.fromkeys(part.name for graph in graphs for part in graph.split())
    print(f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}, one thread; processor ms (GFLOP)\n")
    names = [f"{path.name}, {entry.average_keep:.1%}" for path, entry in zip(options.bundles, manifests)]
    rows = []
    for phase in ("prefill", "decode"):
        for name in places:
            cells = [result.get((phase, name)) for result in results]
            if any(cells):
                rows.append((name, phase, *("" if cell is None else _text([cell]) for cell in cells)))
        sums = [[cell for (kind, _), cell in result.items() if kind == phase] for result in results]
        rows.append(("**all**", phase, *map(_text, sums)))
    print(markdown(("graph", "phase", *names), rows))


def _text(cells: list[tuple[float, float]]) -> str:
    return f"{sum(ms for ms, _ in cells):.2f} ({sum(count for _, count in cells):.3f})"


if __name__ == "__main__":
    main()
