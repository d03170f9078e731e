"""Rewrites a traced graph so that its linear layers read quantized weights through DequantizeLinear.

    x ─────────────────────────────┐
    values [I, O] INT4 ── DequantizeLinear(axis 0, block) ── MatMul        INT4, and INT8 without activation ranges
    scales [I/block, O] ──┘

    x ── QuantizeLinear ── DequantizeLinear ──┐
    values [I, O] INT8 ── DequantizeLinear ── MatMul                       INT8 with activation ranges

FP8 (E4M3) is handled as INT8. Columns of an INT4 weight that are not rounded are 0 in its values and have a product of their
own:

    x ── Gather(columns) ── MatMul(outliers [K, O]) ── Add ── the product above

A weight is stored with its inputs first, as the product reads it, so the trace's transposes disappear. Other nodes, as g W in
a probe's backward half, get a transposed weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import add_constants, add_node, raise_opset
from trio_edge.export.quantize.numerics import activation_scale

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from trio_edge.export.quantize.plan import Format
    from trio_edge.export.quantize.store import StoredForm

SCALE_SUFFIX = ".scale"
SUFFIXES = ("", SCALE_SUFFIX, ".columns", ".outliers")
"""Suffixes of the names of a quantized weight's initializers, in the order of ``StoredForm.array_names``."""
_IR_FROM_FORMAT = {"int4": ir.DataType.INT4, "int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def is_linear(weight: ir.Value) -> bool:
    """Return whether ``weight`` is a matrix [O, I] that is read only by products x Wᵀ."""
    if weight.shape is None or len(weight.shape) != 2:
        return False
    uses = [_product_input(node, index) for node, index in weight.uses()]
    return bool(uses) and all(uses)


def _product_input(node: ir.Node, index: int) -> bool:
    if node.op_type == "Gemm":
        return index == 1 and node.attributes.get_int("transB", 0) == 1
    if node.op_type != "Transpose":
        return False
    return all(user.op_type == "MatMul" and place == 1 for user, place in node.outputs[0].uses())


def quantize_graph(
    model: ir.Model, forms: Mapping[str, StoredForm], *, activation_max: Mapping[str, float], opset: int
) -> dict[str, NDArray[Any]]:
    """Make ``model`` read the initializers in ``forms`` quantized, in place; return the values of new constants.

    The inputs of a product are quantized, too, if ``activation_max`` has their largest absolute value, by the weight's tensor;
    not for INT4.
    The initializer of a weight keeps its name and becomes [I, O] in its format; its other initializers are of that name with
    ``SUFFIXES``. All new initializers still need their values. The graph gets at least ``opset``.
    """
    raise_opset(model, opset)
    constants: dict[str, NDArray[Any]] = {}
    quantized_inputs: dict[ir.Value, ir.Value] = {}
    gathered: dict[tuple[ir.Value, int], ir.Value] = {}
    for name, form in forms.items():
        weight = _dequantized(model.graph, name, form)
        if form.columns_K is not None:
            _add_outliers(model.graph, name, weight, form.columns_K, gathered)
        largest = None if form.kind == "int4" else activation_max.get(form.name)
        if largest is None:
            continue
        for node, index in list(weight.uses()):
            source = node.inputs[0]
            if source is not None and node.op_type in ("MatMul", "Gemm") and index == 1:
                if source not in quantized_inputs:
                    quantized_inputs[source] = _quantized(model.graph, source, form.kind, largest, constants)
                node.replace_input_with(0, quantized_inputs[source])
    model.graph.sort()  # new nodes come after the nodes that read them
    return constants


def _dequantized(graph: ir.Graph, name: str, form: StoredForm) -> ir.Value:
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
    scales = _initializer(graph, name + SCALE_SUFFIX, shape, old.dtype)
    graph.initializers[name] = values
    axes = {"axis": 1} if form.block is None else {"axis": 0, "block_size": form.block}
    read = [values, scales]
    weight = add_node(graph, "DequantizeLinear", read, f"{name}.dequantized", old.dtype, values.shape, **axes)
    _redirect(graph, old, weight)
    return weight


def _redirect(graph: ir.Graph, old: ir.Value, weight: ir.Value) -> None:
    """Make all readers of ``old`` [O, I] read ``weight`` [I, O]."""
    transposed: ir.Value | None = None
    for node, index in list(old.uses()):
        if node.op_type == "Transpose":
            ir.convenience.replace_all_uses_with(node.outputs[0], weight)
            graph.remove(node, safe=True)
        elif node.op_type == "Gemm" and _product_input(node, index):
            node.attributes["transB"] = ir.AttrInt64("transB", 0)
            node.replace_input_with(1, weight)
            _as_matmul(graph, node)
        else:
            if transposed is None:
                name = f"{weight.name}.T"
                transposed = add_node(graph, "Transpose", [weight], name, old.dtype, old.shape, perm=[1, 0])
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
        _add(graph, gemm.outputs[0], bias, "unbiased")


def _add(graph: ir.Graph, product: ir.Value, other: ir.Value, suffix: str) -> None:
    """Give all readers of ``product`` its sum with ``other``, which takes its name; ``product`` gets a suffix."""
    name, product.name = str(product.name), f"{product.name}.{suffix}"
    total = add_node(graph, "Add", [product, other], name, product.dtype, product.shape)
    ir.convenience.replace_all_uses_with(product, total, replace_graph_outputs=True)
    graph[-1].replace_input_with(0, product)


def _initializer(graph: ir.Graph, name: str, shape: Sequence[int], dtype: ir.DataType) -> ir.Value:
    graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return graph.initializers[name]


def _add_outliers(
    graph: ir.Graph,
    name: str,
    weight: ir.Value,
    columns_K: Tensor,
    gathered: dict[tuple[ir.Value, int], ir.Value],
) -> None:
    """Add the product of the columns that ``weight`` [I, O] leaves out; weights of one input share what they gather.

    Other readers get the whole weight.
    """
    assert weight.shape is not None and weight.dtype is not None
    columns = _initializer(graph, name + SUFFIXES[2], (len(columns_K),), ir.DataType.INT64)
    shape = (len(columns_K), *weight.shape.numpy()[1:])
    outliers = _initializer(graph, name + SUFFIXES[3], shape, weight.dtype)
    whole: ir.Value | None = None
    for node, index in list(weight.uses()):
        source = node.inputs[0]
        if node.op_type == "MatMul" and index == 1 and source is not None:
            product, key = node.outputs[0], (source, id(columns_K))
            if key not in gathered:
                few = f"{product.name}.gathered"
                gathered[key] = add_node(graph, "Gather", [source, columns], few, source.dtype, axis=-1)
            more = f"{product.name}.outliers"
            added = add_node(graph, "MatMul", [gathered[key], outliers], more, product.dtype, product.shape)
            _add(graph, product, added, "rounded")
            continue
        if whole is None:
            axes = _initializer(graph, f"{name}.axes", (1,), ir.DataType.INT64)
            axes.const_value = ir.tensor(np.array([1]), name=axes.name)
            rows = add_node(graph, "Unsqueeze", [columns, axes], f"{name}.rows", columns.dtype)
            parts, whole_name = [weight, rows, outliers], f"{name}.whole"
            whole = add_node(graph, "ScatterND", parts, whole_name, weight.dtype, weight.shape)
        node.replace_input_with(index, whole)


def _quantized(
    graph: ir.Graph, source: ir.Value, kind: Format, largest: float, constants: dict[str, NDArray[Any]]
) -> ir.Value:
    """Return ``source``, quantized to the weight's format with one scale, and dequantized."""
    assert source.dtype is not None
    name, rounded, shape = source.name, _IR_FROM_FORMAT[kind], source.shape
    scale = np.array(activation_scale(largest, kind=kind), source.dtype.numpy())
    # without a zero point the output of QuantizeLinear is uint8
    added = {f"{name}.scale": scale, f"{name}.zero": np.zeros((), rounded.numpy())}
    inputs = add_constants(graph, added)
    constants |= added
    down = add_node(graph, "QuantizeLinear", [source, *inputs], f"{name}.quantized", rounded, shape)
    return add_node(graph, "DequantizeLinear", [down, *inputs], f"{name}.rounded", source.dtype, shape)
