"""Layer graphs are one traced layer, repeated: what belongs to a layer is there for each, all else once."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx
import pytest

from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def prefix(keep_all_bundle: Path) -> onnx.ModelProto:
    """Three layers in one graph."""
    return onnx.load(keep_all_bundle / "prefix.onnx", load_external_data=False)


def test_mask_and_rotary_tables_are_computed_once(prefix: onnx.ModelProto) -> None:
    count = Counter(node.op_type for node in prefix.graph.node)
    assert count["Softmax"] == 3
    assert [count[name] for name in ("LessOrEqual", "Cos", "Sin")] == [1, 1, 1]


def test_each_layer_has_its_own_weights(prefix: onnx.ModelProto) -> None:
    places = Counter(
        (entries["location"], entries["offset"])
        for tensor in prefix.graph.initializer
        if tensor.name.startswith("layers.")
        for entries in [{entry.key: entry.value for entry in tensor.external_data}]
    )
    assert len(places) == 3 * 9  # four projections of attention, three of the MLP, two norms
    assert set(places.values()) == {1}


def test_inputs_and_outputs_are_those_of_the_manifest(prefix: onnx.ModelProto, keep_all_bundle: Path) -> None:
    spec = open_bundle(keep_all_bundle).manifest.graph("prefix")
    for tensors, values in ((spec.inputs, prefix.graph.input), (spec.outputs, prefix.graph.output)):
        shapes = [
            tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
            for value in values
        ]
        assert [tensor.name for tensor in tensors] == [value.name for value in values]
        assert [tensor.shape for tensor in tensors] == shapes
