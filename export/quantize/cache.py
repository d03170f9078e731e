"""Rewrites traced layer ranges for INT8 KV caches: past rows are read and new rows returned with constant scales.

    past_key_values.{i}.key  INT8 ───────────────────── DequantizeLinear ── attention
    new keys, rotated ── QuantizeLinear ──┬──────────── DequantizeLinear ── attention
                                          └── present.{i}.key  INT8

A pass attends to its own rows as later ones will read them, so an answer does not depend on how its rows are divided into
passes: decode equals prefill. All keys of a layer share one scale, and so do its values, because TensorRT quantizes
activations with one constant scale per tensor.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import add_constants, add_node, raise_opset
from trio_edge.export.quantize.numerics import activation_scale
from trio_edge.export.quantize.plan import OPSETS
from trio_edge.runtime.bundle.graph_io import PAST_PREFIX, PRESENT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph
    from trio_edge.export.quantize.scales import CacheRange
    from trio_edge.runtime.bundle.manifest import TensorSpec


def quantize_caches(graphs: Iterable[TracedGraph], ranges: Sequence[CacheRange]) -> list[TracedGraph]:
    """Return the graphs with INT8 KV caches, changed in place; ``ranges`` has one entry per decoder layer."""
    return [_with_cache(graph, ranges) if graph.spec.num_layers else graph for graph in graphs]


def _with_cache(traced: TracedGraph, ranges: Sequence[CacheRange]) -> TracedGraph:
    raise_opset(traced.model, OPSETS["int8"])
    graph = traced.model.graph
    constants: dict[str, NDArray[Any]] = {}
    for past in [value for value in graph.inputs if str(value.name).startswith(PAST_PREFIX)]:
        part = str(past.name).removeprefix(PAST_PREFIX)
        layer, _, kind = part.partition(".")
        largest = ranges[int(layer)].key if kind == "key" else ranges[int(layer)].value
        assert past.dtype is not None
        scale = np.array(activation_scale(largest), past.dtype.numpy())
        # without a zero point the output of QuantizeLinear is uint8
        added = {f"{PAST_PREFIX}{part}.scale": scale, f"{PAST_PREFIX}{part}.zero": np.array(0, np.int8)}
        constants |= added
        inputs = add_constants(graph, added)
        _read_rounded(graph, list(past.uses()), past, inputs, dtype=past.dtype)
        past.type = ir.TensorType(ir.DataType.INT8)
        _return_rounded(graph, f"{PRESENT_PREFIX}{part}", inputs)
    graph.sort()  # new nodes come after the nodes that read them
    spec = traced.spec
    spec = msgspec.structs.replace(
        spec,
        inputs=tuple(map(_in_cache_type, spec.inputs)),
        outputs=tuple(map(_in_cache_type, spec.outputs)),
        opset=traced.model.opset_imports[""],
    )
    return replace(traced, spec=spec, constants={**traced.constants, **constants})


def _read_rounded(
    graph: ir.Graph,
    readers: Iterable[tuple[ir.Node, int]],
    rounded: ir.Value,
    scale: list[ir.Value],
    *,
    dtype: ir.DataType,
) -> None:
    """Give ``readers`` the dequantized values of ``rounded``."""
    name = f"{rounded.name}.dequantized"
    values = add_node(graph, "DequantizeLinear", [rounded, *scale], name, dtype, rounded.shape)
    for node, index in readers:
        node.replace_input_with(index, values)


def _return_rounded(graph: ir.Graph, name: str, scale: list[ir.Value]) -> None:
    """Make the output ``name`` INT8, and let the graph read it, too."""
    index = next(index for index, value in enumerate(graph.outputs) if value.name == name)
    rows = graph.outputs[index]
    rows.name = f"{name}.unquantized"
    readers = list(rows.uses())
    rounded = add_node(graph, "QuantizeLinear", [rows, *scale], name, ir.DataType.INT8, rows.shape)
    graph.outputs[index] = rounded
    assert rows.dtype is not None
    _read_rounded(graph, readers, rounded, scale, dtype=rows.dtype)


def _in_cache_type(tensor: TensorSpec) -> TensorSpec:
    is_cached = tensor.name.startswith((PAST_PREFIX, PRESENT_PREFIX))
    return msgspec.structs.replace(tensor, dtype="int8") if is_cached else tensor
