"""Rewrites a traced graph so that its linear layers read quantized weights through DequantizeLinear.

    x ─────────────────────────────┐
    values [I, O] INT4 ── DequantizeLinear(axis 0, block) ── MatMul        INT4, and INT8 without activation ranges
    scales [I/block, O] ──┘

    x ── QuantizeLinear ── DequantizeLinear ──┐
    values [I, O] INT8 ── DequantizeLinear ── MatMul                       INT8 with activation ranges

FP8 (E4M3) is handled as INT8.

A weight is stored with its inputs first, as the product reads it, so the trace's transposes disappear. Other nodes, as g W in
a probe's backward half, get a transposed weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import add_constants, make_node, raise_opset
from trio_edge.export.quantize.numerics import activation_scale

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.export.quantize.numerics import Format

SCALE_SUFFIX = ".scale"
"""Suffix of the name of the initializer that holds another one's scales."""
_IR_FROM_FORMAT = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearForm:
    """The quantized form of one weight in a graph."""

    kind: Format
    block: int | None
    """Inputs that share a scale; None for one scale per output."""
    activation_max: float | None = None
    """Largest absolute input of the product; None if inputs are not quantized."""


def is_linear(weight: ir.Value) -> bool:
    """Return whether ``weight`` is a matrix [O, I] that is read only by products x Wᵀ."""
    if weight.shape is None or len(weight.shape) != 2:
        return False
    uses = [_product_input(node, index) for node, index in weight.uses()]
    return bool(uses) and all(uses)


def _product_input(node: ir.Node, index: int) -> bool:
    if node.op_type == "Gemm":
        return index == 1 and _is_transposed(node)
    if node.op_type != "Transpose":
        return False
    return all(user.op_type == "MatMul" and place == 1 for user, place in node.outputs[0].uses())


def _is_transposed(gemm: ir.Node) -> bool:
    attribute = gemm.attributes.get("transB")
    return attribute is not None and attribute.as_int() == 1


def quantize_graph(
    model: ir.Model, forms: Mapping[str, LinearForm], *, opset: int
) -> dict[str, NDArray[Any]]:
    """Make ``model`` read the initializers in ``forms`` quantized, in place; return the values of new constants.

    The initializer of a weight keeps its name and becomes [I, O] in its format; its scales are an initializer of that name
    with ``SCALE_SUFFIX``. All new initializers still need their values. The graph gets at least ``opset``.
    """
    raise_opset(model, opset)
    constants: dict[str, NDArray[Any]] = {}
    quantized_inputs: dict[ir.Value, ir.Value] = {}
    for name, form in forms.items():
        weight = _dequantized(model.graph, name, form)
        if form.activation_max is not None:
            for node, index in list(weight.uses()):
                if node.op_type in ("MatMul", "Gemm") and index == 1:
                    source = node.inputs[0]
                    assert source is not None
                    if source not in quantized_inputs:
                        quantized_inputs[source] = _quantized(model.graph, source, form, constants)
                    node.replace_input_with(0, quantized_inputs[source])
    model.graph.sort()  # new nodes come after the nodes that read them
    return constants


def _dequantized(graph: ir.Graph, name: str, form: LinearForm) -> ir.Value:
    """Replace the initializer ``name`` [O, I] by its quantized form; return the dequantized value [I, O]."""
    old = graph.initializers[name]
    assert old.shape is not None and old.dtype is not None
    num_outputs, num_inputs = (int(size) for size in old.shape.numpy())
    del graph.initializers[name]
    old.name = f"{name}.unquantized"
    values = ir.Value(
        name=name, shape=ir.Shape((num_inputs, num_outputs)), type=ir.TensorType(_IR_FROM_FORMAT[form.kind])
    )
    shape = (num_outputs,) if form.block is None else (num_inputs // form.block, num_outputs)
    scales = ir.Value(name=name + SCALE_SUFFIX, shape=ir.Shape(shape), type=ir.TensorType(old.dtype))
    graph.initializers[name], graph.initializers[name + SCALE_SUFFIX] = values, scales
    attributes = {"axis": 1} if form.block is None else {"axis": 0, "block_size": form.block}
    node = make_node(
        "DequantizeLinear", [values, scales], f"{name}.dequantized", old.dtype, values.shape, attributes
    )
    graph.append(node)
    _redirect(graph, old, node.outputs[0])
    return node.outputs[0]


def _redirect(graph: ir.Graph, old: ir.Value, weight: ir.Value) -> None:
    """Make all readers of ``old`` [O, I] read ``weight`` [I, O]."""
    transposed: ir.Value | None = None
    for node, index in list(old.uses()):
        if node.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)
        elif node.op_type == "Gemm" and index == 1 and _is_transposed(node):
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
            node.replace_input_with(1, weight)
            _as_matmul(graph, node)
        else:
            if transposed is None:
                assert old.dtype is not None
                back = make_node(
                    "Transpose", [weight], f"{weight.name}.T", old.dtype, old.shape, {"perm": [1, 0]}
                )
                graph.append(back)
                transposed = back.outputs[0]
            node.replace_input_with(index, transposed)


def _as_matmul(graph: ir.Graph, gemm: ir.Node) -> None:
    """Turn a Gemm without factors into a MatMul, which ONNX Runtime's INT4 and INT8 kernels need, and an Add."""
    factors = [gemm.attributes[name].as_float() for name in ("alpha", "beta") if name in gemm.attributes]
    if gemm.attributes.get_int("transA", 0) or any(factor != 1.0 for factor in factors):
        return
    gemm.op_type = "MatMul"
    gemm.attributes.clear()
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    gemm.resize_inputs(2)
    if bias is not None:
        product = gemm.outputs[0]
        assert product.dtype is not None
        add = make_node("Add", [product, bias], f"{product.name}.biased", product.dtype, product.shape, {})
        graph.append(add)
        ir.convenience.replace_all_uses_with(product, add.outputs[0], replace_graph_outputs=True)
        add.replace_input_with(0, product)


def _quantized(
    graph: ir.Graph, source: ir.Value, form: LinearForm, constants: dict[str, NDArray[Any]]
) -> ir.Value:
    """Return ``source``, quantized to the weight's format with one scale, and dequantized."""
    assert source.dtype is not None and form.activation_max is not None
    kind, rounded = source.dtype, _IR_FROM_FORMAT[form.kind]
    scale = np.array(activation_scale(form.activation_max, kind=form.kind), kind.numpy())
    # without a zero point the output of QuantizeLinear is uint8
    added = {f"{source.name}.scale": scale, f"{source.name}.zero": np.zeros((), rounded.numpy())}
    inputs = add_constants(graph, added)
    constants |= added
    down = make_node(
        "QuantizeLinear", [source, *inputs], f"{source.name}.quantized", rounded, source.shape, {}
    )
    up = make_node(
        "DequantizeLinear", [down.outputs[0], *inputs], f"{source.name}.rounded", kind, source.shape, {}
    )
    graph.extend([down, up])
    return up.outputs[0]
