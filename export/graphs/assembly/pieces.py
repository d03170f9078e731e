"""Joins traced graphs that read the same weights into one, so that an engine holds the weights once.

The pieces share nothing but weights, and products with quantized ones: none reads a tensor of another, and at a profile of
one piece all sizes of the others are 0.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import add_node, raise_opset
from trio_edge.runtime.bundle.manifest import Piece

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.export.checkpoints.weights import StoredName
    from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph
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
    if any(piece.spec.opset is not None for piece in pieces):  # quantized
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
            inputs=tuple(tensor.name for tensor in one.inputs),
            outputs=tuple(tensor.name for tensor in one.outputs),
            profiles=tuple(profile.name for profile in one.profiles),
            weight_bytes=one.weight_bytes,
        )
        for piece, one in zip(pieces, written)
        if piece.piece is not None
    ]
    return msgspec.structs.replace(spec, pieces=tuple(entries))


class _Constants(NamedTuple):
    """Initializers that all merged products use."""

    zero: ir.Value
    one: ir.Value
    end: ir.Value


class _Rows(NamedTuple):
    """The rows that enter a merged product [1, S + R, I], and S."""

    all: ir.Value
    first_count: ir.Value


def share_products(graph: ir.Graph) -> None:
    """Merge the products of two pieces with one quantized weight, in place, so that ``graph`` reads it at one place.

        rows of one piece [1, S, I] ────┐
                                      Concat ── MatMul ──► results of one piece, results of the other
        rows of the other [R, I] ───────┘          └ DequantizeLinear

    An engine stores a quantized weight once for each product that reads it, and tensorrt-rtx 1.7 can even end abnormally while
    it builds one with two products of an INT4 weight. At any profile either S or R is 0.
    """
    readers: defaultdict[tuple[ir.Value | None, ...], list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] in graph.initializers.values():
            readers[tuple(node.inputs)].append(node)
    pairs = [nodes for nodes in readers.values() if len(nodes) > 1]
    if not pairs:
        return
    constants = _Constants(*(_constant(graph, value) for value in (0, 1, np.iinfo(np.int32).max)))
    merged: dict[tuple[ir.Value, ir.Value], _Rows] = {}
    for number, (first, second) in enumerate(pairs):
        products = _product(first), _product(second)
        read, other = map(_input, products)
        sources = _before_rounding(read), _before_rounding(other)
        if sources not in merged:
            merged[sources] = _concatenated(
                graph, read, sources, name=f"shared.{number}.rows", constants=constants
            )
        _merge(graph, products, merged[sources], name=f"shared.{number}", constants=constants)
        graph.remove([*products, second], safe=True)
    graph.sort()


def _constant(graph: ir.Graph, number: int) -> ir.Value:
    name = f"shared.constant_{number}"
    value = ir.Value(
        name=name,
        shape=ir.Shape((1,)),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([number], np.int64), name=name),
    )
    graph.initializers[name] = value
    return value


def _product(dequantized: ir.Node) -> ir.Node:
    """Return the only reader of a weight, which is a product of rows with it."""
    ((node, place),) = dequantized.outputs[0].uses()
    assert (node.op_type, place) == ("MatMul", 1), "a forward product"
    return node


def _before_rounding(rows: ir.Value) -> ir.Value:
    """Return ``rows`` before they were quantized and dequantized, if they were."""
    rounding = _rounding(rows)
    return rows if not rounding else _input(rounding[0])


def _rounding(rows: ir.Value) -> tuple[ir.Node, ...]:
    """Return QuantizeLinear and DequantizeLinear, which made ``rows``; nothing if others did."""
    up = rows.producer()
    if up is None or up.op_type != "DequantizeLinear":
        return ()
    down = _input(up).producer()
    assert down is not None
    return down, up


def _input(node: ir.Node, index: int = 0) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _concatenated(
    graph: ir.Graph,
    read: ir.Value,
    sources: tuple[ir.Value, ir.Value],
    *,
    name: str,
    constants: _Constants,
) -> _Rows:
    """Return the rows of both pieces, rounded as ``read``, which the first product reads."""
    first, second = sources
    one = ir.Shape((1,))
    count = add_node(graph, "Shape", [first], f"{name}.count", ir.DataType.INT64, one, start=1, end=2)
    lifted = add_node(graph, "Unsqueeze", [second, constants.zero], f"{name}.lifted", first.dtype)
    rows = add_node(graph, "Concat", [first, lifted], name, first.dtype, axis=1)
    for old in _rounding(read):
        scales = [value for value in old.inputs[1:] if value is not None]
        rows = add_node(graph, old.op_type, [rows, *scales], f"{name}.{old.op_type}", old.outputs[0].dtype)
    return _Rows(rows, count)


def _merge(
    graph: ir.Graph,
    products: tuple[ir.Node, ir.Node],
    rows: _Rows,
    *,
    name: str,
    constants: _Constants,
) -> None:
    """Make all readers of both ``products`` read the product of all rows with the weight of the first."""
    first, second = (node.outputs[0] for node in products)
    dtype, count, (zero, one, end) = first.dtype, rows.first_count, constants
    result = add_node(graph, "MatMul", [rows.all, _input(products[0], 1)], name, dtype)
    own = add_node(graph, "Slice", [result, zero, count, one], f"{name}.first", dtype, first.shape)
    rest = add_node(graph, "Slice", [result, count, end, one], f"{name}.rest", dtype)
    other = add_node(graph, "Squeeze", [rest, zero], f"{name}.second", dtype, second.shape)
    ir.convenience.replace_all_uses_with([first, second], [own, other])
