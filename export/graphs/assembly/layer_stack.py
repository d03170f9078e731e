"""Makes the graph of many decoder layers from the trace of one.

Tracing takes seconds a layer, and decoder layers differ in nothing but their weights. So one layer is traced, once for a
whole export, and its nodes are repeated. Mask, rotary tables and sizes do not belong to a layer and stay single.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from trio_edge.export.graphs.assembly.onnx_graph import graph_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import TensorSpec

LAYER_PREFIX = "layers.0."
"""Start of the names of the traced layer's own weights."""
# inputs: hidden states, position ids, past length, then key and value of each layer
_HIDDEN, _FIRST_PAST = 0, 3


def stack_layers(
    layer: ir.Model,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    num_layers: int,
    num_planes: int = 0,
    last_input: TensorSpec | None = None,
) -> ir.Model:
    """Return ``num_layers`` copies of ``layer``, one after the other; ``layer`` itself does not change.

    Args:
        layer: Trace of a ``DecoderRange`` with one layer.
        inputs: I/O tensors of the result in the order of ``DecoderRange``.
        outputs: In the same order: hidden states, then key and value of each layer.
        num_layers: Number of copies; layer i's weights become initializers ``layers.{i}.…``.
        num_planes: Rows to add to the outputs of the first so many layers; the last of ``inputs``.
        last_input: A further output, after the others: the hidden states that enter the last layer.
    """
    source = layer.graph
    own = _own_values(source)
    graph_inputs = [graph_value(spec) for spec in inputs]
    shared = dict(zip(source.inputs[:_FIRST_PAST], graph_inputs))
    initializers, nodes, present = [], [], []
    for value in source.initializers.values():
        if value not in own:
            shared[value] = _copy(value, str(value.name))
            initializers.append(shared[value])
    hidden = graph_inputs[_HIDDEN]
    for index in range(num_layers):
        enters_last = hidden
        past = graph_inputs[_FIRST_PAST + 2 * index :][:2]
        values = {**shared, source.inputs[_HIDDEN]: hidden, **dict(zip(source.inputs[_FIRST_PAST:], past))}
        for value in source.initializers.values():
            if value in own:
                name = f"layers.{index}.{str(value.name).removeprefix(LAYER_PREFIX)}"
                values[value] = _copy(value, name)
                initializers.append(values[value])
        for node in source:
            if node.outputs[0] in own:
                nodes.append(_repeat(node, values, suffix=f".{index}"))
            elif index == 0:
                nodes.append(_repeat(node, values, suffix=""))
                shared |= {value: values[value] for value in node.outputs}
        hidden, *new_rows = (values[value] for value in source.outputs)
        present += new_rows
        if index < num_planes:
            plane = graph_inputs[len(inputs) - num_planes + index]
            nodes.append(ir.Node("", "Add", [hidden, plane], num_outputs=1, name=f"deepstack.{index}"))
            (hidden,) = nodes[-1].outputs
            hidden.name, hidden.shape, hidden.type = f"with_deepstack.{index}", plane.shape, plane.type
    results = [hidden, *present]
    if last_input is not None:
        # a copy: with one layer it would be an input of the graph, which cannot be an output as well
        same = ir.Node("", "Identity", [enters_last], num_outputs=1, name="last_input")
        nodes.append(same)
        results, outputs = [*results, same.outputs[0]], [*outputs, last_input]
    for value, spec in zip(results, outputs):
        named = graph_value(spec)
        value.name, value.shape, value.type = named.name, named.shape, named.type
    graph = ir.Graph(
        graph_inputs,
        results,
        nodes=nodes,
        initializers=initializers,
        opset_imports=dict(source.opset_imports),
        name=source.name,
    )
    return ir.Model(graph, ir_version=layer.ir_version)


def _own_values(graph: ir.Graph) -> set[ir.Value]:
    """Return what differs from layer to layer: weights, past rows, hidden states, and all that is computed from them.

    A shape does not differ: what is computed from shapes, as the mask is, belongs to all layers.
    """
    own = {graph.inputs[_HIDDEN], *graph.inputs[_FIRST_PAST:]}
    own |= {value for name, value in graph.initializers.items() if name.startswith(LAYER_PREFIX)}
    for node in graph:
        if node.op_type != "Shape" and any(value in own for value in node.inputs):
            own |= set(node.outputs)
    return own


def _copy(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def _repeat(node: ir.Node, values: dict[ir.Value, ir.Value], *, suffix: str) -> ir.Node:
    """Return a copy of ``node`` that reads from ``values`` and adds its outputs to them."""
    outputs = [_copy(value, f"{value.name}{suffix}") for value in node.outputs]
    values |= dict(zip(node.outputs, outputs))
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[value] for value in node.inputs],
        list(node.attributes.values()),
        overload=node.overload,
        outputs=outputs,
        name=f"{node.name}{suffix}",
    )
