"""Merges the products of two pieces with one quantized weight, so that the joined graph reads it at one place.

    rows of one piece [1, S, I] ────┐
                                  Concat ── MatMul ──► results of one piece, results of the other
    rows of the other [R, I] ───────┘          └ DequantizeLinear

An engine stores a quantized weight once for each product that reads it, and tensorrt-rtx 1.7 can even end abnormally while
it builds one with two products of an INT4 weight. At any profile either S or R is 0.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import make_node


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
    """Merge the products with equal quantized weights in ``graph``, in place; the first of two has rows [1, S, I]."""
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
        sources = _before_rounding(products[0].inputs[0]), _before_rounding(products[1].inputs[0])
        if sources not in merged:
            merged[sources] = _concatenated(
                graph, products[0].inputs[0], sources, name=f"shared.{number}.rows", constants=constants
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


def _before_rounding(rows: ir.Value | None) -> ir.Value:
    """Return ``rows`` before they were quantized and dequantized, if they were."""
    assert rows is not None
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


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _concatenated(
    graph: ir.Graph,
    read: ir.Value | None,
    sources: tuple[ir.Value, ir.Value],
    *,
    name: str,
    constants: _Constants,
) -> _Rows:
    """Return the rows of both pieces, rounded as ``read``, which the first product reads."""
    first, second = sources
    dtype = first.dtype
    assert read is not None and dtype is not None
    count = make_node(
        "Shape", [first], f"{name}.count", ir.DataType.INT64, ir.Shape((1,)), {"start": 1, "end": 2}
    )
    lifted = make_node("Unsqueeze", [second, constants.zero], f"{name}.lifted", dtype, None, {})
    both = make_node("Concat", [first, lifted.outputs[0]], name, dtype, None, {"axis": 1})
    nodes, rows = [count, lifted, both], both.outputs[0]
    for old in _rounding(read):
        scales = [value for value in old.inputs[1:] if value is not None]
        kind = old.outputs[0].dtype
        assert kind is not None
        nodes.append(make_node(old.op_type, [rows, *scales], f"{name}.{old.op_type}", kind, None, {}))
        rows = nodes[-1].outputs[0]
    graph.extend(nodes)
    return _Rows(rows, count.outputs[0])


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
    weight, dtype = products[0].inputs[1], first.dtype
    assert weight is not None and dtype is not None
    product = make_node("MatMul", [rows.all, weight], name, dtype, None, {})
    result, count = product.outputs[0], rows.first_count
    own = make_node(
        "Slice", [result, constants.zero, count, constants.one], f"{name}.first", dtype, first.shape, {}
    )
    rest = make_node("Slice", [result, count, constants.end, constants.one], f"{name}.rest", dtype, None, {})
    other = make_node("Squeeze", [rest.outputs[0], constants.zero], f"{name}.second", dtype, second.shape, {})
    graph.extend([product, own, rest, other])
    ir.convenience.replace_all_uses_with([first, second], [own.outputs[0], other.outputs[0]])
