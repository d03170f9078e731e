"""Joins traced graphs that read the same weights into one, so that an engine holds the weights once.

The pieces share nothing but weights, and products with quantized ones: none reads a tensor of another, and at a profile of
one piece all sizes of the others are 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import raise_opset
from trio_edge.export.graphs.assembly.shared_products import share_products
from trio_edge.runtime.bundle.manifest import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.export.checkpoints.weights import StoredName
    from trio_edge.export.graphs.assembly.traced import TracedGraph
    from trio_edge.runtime.bundle.manifest import GraphSpec


def join(pieces: Sequence[TracedGraph]) -> TracedGraph:
    """Return one graph with all tensors and profiles of ``pieces``, which stay as they are and have no weights yet.

    Names in the first piece stay; names in the others get the piece's name as a prefix.
    """
    opset = max(piece.model.opset_imports[""] for piece in pieces)
    first_value: dict[StoredName, ir.Value] = {}
    inputs, outputs, nodes, initializers = [], [], [], []
    weights, constants = {}, {}
    for piece in pieces:
        before = "" if piece is pieces[0] else f"{piece.piece}/"
        model = piece.model.clone()
        raise_opset(model, opset)
        graph = model.graph
        own_inputs, own_outputs = list(graph.inputs), list(graph.outputs)
        for name, value in list(graph.initializers.items()):
            del graph.initializers[name]
            stored = piece.weights.get(name)
            if stored in first_value:
                ir.convenience.replace_all_uses_with(value, first_value[stored])
                continue
            value.name = before + name
            initializers.append(value)
            if stored is not None:
                first_value[stored] = value
                weights[value.name] = stored
            elif name in piece.constants:
                constants[value.name] = piece.constants[name]
        graph.inputs.clear()
        graph.outputs.clear()
        for node in list(graph):
            graph.remove(node)
            node.name = before + str(node.name)
            for value in node.outputs:
                if value not in own_outputs:
                    value.name, value.shape = before + str(value.name), _renamed(value.shape, before)
            nodes.append(node)
        inputs += own_inputs
        outputs += own_outputs
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": opset},
        name=pieces[0].spec.name,
    )
    share_products(graph)
    model = ir.Model(graph, ir_version=max(piece.model.ir_version for piece in pieces))
    return replace(
        pieces[0], spec=_joined_spec(pieces), model=model, weights=weights, constants=constants, piece=None
    )


def _renamed(shape: ir.Shape | None, before: str) -> ir.Shape | None:
    """Return a shape with prefixed symbols, because traces use the same ones, and equal symbols would mean equal sizes."""
    if shape is None or not before:
        return shape
    return ir.Shape([size if isinstance(size, int) else f"{before}{size}" for size in shape])


def _joined_spec(pieces: Sequence[TracedGraph]) -> GraphSpec:
    specs, first = [piece.spec for piece in pieces], pieces[0].spec
    opsets = [spec.opset for spec in specs if spec.opset is not None]
    return msgspec.structs.replace(
        first,
        file=f"{first.name}.onnx",
        inputs=tuple(tensor for spec in specs for tensor in spec.inputs),
        outputs=tuple(tensor for spec in specs for tensor in spec.outputs),
        profiles=tuple(profile for spec in specs for profile in spec.profiles),
        opset=max(opsets, default=None),
    )


def with_pieces(spec: GraphSpec, pieces: Sequence[TracedGraph], written: Sequence[GraphSpec]) -> GraphSpec:
    """Return the joined graph's description with those of its written pieces."""
    entries = [
        Piece(
            name=piece.piece,
            file=one.file,
            inputs=one.input_names,
            outputs=tuple(tensor.name for tensor in one.outputs),
            profiles=tuple(profile.name for profile in one.profiles),
            weight_bytes=one.weight_bytes,
        )
        for piece, one in zip(pieces, written)
        if piece.piece is not None
    ]
    return msgspec.structs.replace(spec, pieces=tuple(entries))
