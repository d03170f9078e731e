"""TRIO works with fused attention: outside of the layers' own attention, only the probe rows' attention is ever computed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path


def softmax_shapes(file: Path) -> list[list[str | int]]:
    """Return the shape of every Softmax of a graph, with names of dynamic axes."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(file, load_external_data=False)).graph
    known = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.output)}
    outputs = [node.output[0] for node in graph.node if node.op_type == "Softmax"]
    return [[axis.dim_param or axis.dim_value for axis in known[name]] for name in outputs]


def test_only_probe_rows_have_attention_outside_of_the_layers(reduced_bundle: Path) -> None:
    bundle = open_bundle(reduced_bundle)
    rows = bundle.manifest.schedule.num_probe_rows
    probes = []
    for graph in bundle.manifest.graphs:
        for part in graph.split():
            shapes = softmax_shapes(bundle.path(part.file))
            piece = part.name.partition(".")[2]
            if graph.role == "select" or piece == "saliency":
                assert shapes == []
            elif piece == "probe":
                ((_, queries, _keys),) = shapes
                symbol = str(queries).rpartition("*")[2]  # query heads of a group lie side by side
                assert {profile.sizes[symbol] for profile in part.profiles} == {rows}
                probes.append(part.name)
    assert probes == ["segment_1.probe", "suffix.probe"]
