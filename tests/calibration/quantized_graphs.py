"""The vision and head graphs of a checkpoint, quantized as trio-export does it; traced once, as that takes the time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch._subclasses.fake_tensor import FakeTensorMode

from tests.shared_traces import shared_traces
from trio_edge.export import tracing
from trio_edge.export.bundle import write_graph
from trio_edge.export.checkpoints.checkpoint import Checkpoint, read_checkpoint
from trio_edge.export.checkpoints.weights import store_weights
from trio_edge.export.families import check_architecture, family_of
from trio_edge.export.graphs.layout import Layout
from trio_edge.export.plan import dimensions_of
from trio_edge.export.quantize.assign import StoredForm, plain_tensors, quantize_graphs
from trio_edge.export.quantize.store import store_quantized
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.bundle.manifest import GraphSpec


@dataclass(frozen=True)
class TracedEnds:
    """Vision and head."""

    checkpoint: Checkpoint
    graphs: list[tracing.TracedGraph]


def traced_ends(checkpoint_folder: Path, picture_size: tuple[int, int]) -> TracedEnds:
    """Return the graphs for pictures of one size, without weights."""
    checkpoint = read_checkpoint(str(checkpoint_folder), check_config=check_architecture)
    family = family_of(checkpoint)
    pictures = family.image_processing(checkpoint, encoder_keep=None, max_visual=None)
    layout = Layout(
        vision_sizes=(pictures.sizes(*picture_size),),
        schedule=Schedule(),
        token_keep=None,
        text_buckets=(32,),
        max_new_tokens=1,
        dtype="float32",
        opset=18,
    )
    with FakeTensorMode(allow_non_fake_inputs=True), shared_traces():
        model = family.build(checkpoint, processing=pictures, dtype="float32", with_features=False)
        tracer = tracing._Tracer(model, checkpoint, layout=layout, dimensions=dimensions_of(model))
        return TracedEnds(checkpoint, [tracing._vision(tracer), tracing._head(tracer)])


def write_quantized(
    ends: TracedEnds, plan: QuantizePlan, scales: CalibratedScales, folder: Path
) -> tuple[tuple[StoredForm, ...], list[GraphSpec]]:
    """Write vision.onnx and head.onnx with their weights into ``folder``; return how tensors were stored, and the graphs."""
    copies = [replace(graph, model=graph.model.clone()) for graph in ends.graphs]
    graphs, forms = quantize_graphs(copies, plan, scales, checkpoint=ends.checkpoint)
    stored = store_weights(
        ends.checkpoint,
        plain_tensors(graphs, forms),
        folder,
        dtype="float32",
        whole_files=False,
        on_bytes=lambda _count: None,
    )
    stored = stored.with_more(
        store_quantized(ends.checkpoint, forms, folder, dtype="float32", on_bytes=lambda _count: None)
    )
    return forms, [write_graph(graph, stored.tensors, folder) for graph in graphs]
