"""The vision and head graphs of a checkpoint, quantized as trio-export does it; traced once, as that takes the time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tests.shared_traces import shared_traces
from trio_edge.export.bundle import write_graph
from trio_edge.export.checkpoints.weights import store_weights
from trio_edge.export.options import ExportOptions
from trio_edge.export.plan import build, read, resolve, without_values
from trio_edge.export.quantize.assign import plain_tensors, quantize_graphs
from trio_edge.export.quantize.store import StoredForm, store_quantized
from trio_edge.export.tracing.graphs import Tracer
from trio_edge.export.tracing.wiring import Wiring
from trio_edge.trio.budgets import ScheduleRequest

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.bundle.manifest import GraphSpec


@dataclass(frozen=True)
class TracedEnds:
    """Vision and head."""

    checkpoint: Checkpoint
    graphs: list[TracedGraph]


def traced_ends(checkpoint_folder: Path, picture_size: tuple[int, int]) -> TracedEnds:
    """Return the graphs for pictures of one size, without weights."""
    options = ExportOptions(
        model=str(checkpoint_folder),
        schedule=ScheduleRequest(average=None),
        out=checkpoint_folder / "bundle",
        image_sizes=(picture_size,),
        only_image_sizes=True,
        max_text=32,
        max_new_tokens=1,
        dtype="float32",
    )
    source = read(options)
    with without_values("float32"), shared_traces():
        resolved = resolve(options, source)
        plan = build(options, source, resolved)
        tracer, wiring = Tracer(plan), Wiring(plan, is_quantized=lambda _role: False)
        ends = [graph for graph in wiring.graphs if graph.spec.name in ("vision", "head")]
        return TracedEnds(source.checkpoint, [tracer.trace(graph) for graph in ends])


def write_quantized(
    ends: TracedEnds, plan: QuantizePlan, scales: CalibratedScales, folder: Path
) -> tuple[tuple[StoredForm, ...], list[GraphSpec]]:
    """Write vision.onnx and head.onnx with their weights into ``folder``; return how tensors were stored, and the graphs."""
    copies = [replace(graph, model=graph.model.clone()) for graph in ends.graphs]
    graphs, forms = quantize_graphs(copies, plan, scales, checkpoint=ends.checkpoint)
    stored = store_weights(
        plain_tensors(graphs, ends.checkpoint, forms),
        folder,
        dtype="float32",
        whole_files=False,
        on_bytes=lambda _count: None,
    )
    stored = stored.with_more(
        store_quantized(ends.checkpoint, forms, folder, dtype="float32", on_bytes=lambda _count: None)
    )
    return forms, [write_graph(graph, stored.tensors, folder) for graph in graphs]
