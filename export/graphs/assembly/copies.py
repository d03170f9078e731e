"""Makes a graph of many layers from traces of a few parts.

Tracing takes seconds per layer, and layers differ only in their weights. So each kind of part is traced once, and its nodes
are copied. Nodes that are the same in all copies, such as masks, rotary tables and sizes, are not repeated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import onnx_ir as ir
from torch import nn

from trio_edge.export.graphs.assembly.onnx_graph import IR_FROM_DTYPE, add_node
from trio_edge.runtime.bundle.graph_io import DEEPSTACK, NUM_ROWS, PREVIOUS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, TensorSpec

LAYER_PREFIX = "layers.0."
"""Prefix of the names of a traced part's weights."""


class Part(NamedTuple):
    """A module that is traced once."""

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Copy(NamedTuple):
    """One copy of a part in a graph."""

    part: str
    weights: str
    """Prefix of the names of the copy's weights in the whole module."""
    inputs: Sequence[str]
    """Inputs of the graph, or outputs of earlier copies."""
    outputs: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayeredModule:
    """A module as copies of a few parts."""

    parts: Mapping[str, Part]
    copies: tuple[Copy, ...]

    def assemble(
        self, traces: Mapping[str, ir.Model], *, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> ir.Model:
        """Return the whole graph, made of the parts in ``traces``."""
        graph = Copies(inputs)
        values = dict(zip((tensor.name for tensor in inputs), graph.inputs))
        for number, copy in enumerate(self.copies):
            found = graph.add(
                traces[copy.part],
                [values[name] for name in copy.inputs],
                varying=self._varying(copy.part),
                weights=copy.weights,
                own_suffix=f".{number}",
                shared_suffix=f".{copy.part}",
            )
            values |= zip(copy.outputs, found)
        return graph.model(
            [values[tensor.name] for tensor in outputs], outputs, like=next(iter(traces.values()))
        )

    def _varying(self, part: str) -> list[int]:
        """Return the indices of a part's inputs that differ between its copies."""
        places = zip(*(copy.inputs for copy in self.copies if copy.part == part))
        return [index for index, names in enumerate(places) if len(set(names)) > 1]


def first_past(spec: GraphSpec) -> int:
    """Return the number of a layer range's inputs before keys and values or states."""
    return 4 if NUM_ROWS in spec.input_names else 3


def stack_layers(layers: Sequence[ir.Model], spec: GraphSpec) -> ir.Model:
    """Return the graph ``spec`` of decoder layers: copies of ``layers``, one after the other; these do not change.

    There are as many models as layers; those of one structure are one object. DeepStack planes are added to the outputs of the
    first layers. The last output is ``PREVIOUS``, if there is one: the hidden states that enter the last layer. Layer i's weights
    become initializers ``layers.{i}.…``.
    """
    graph = Copies(spec.inputs)
    first = first_past(spec)
    hidden, *shared = graph.inputs[:first]
    kinds = list({id(layer): layer for layer in layers}.values())
    planes = [value for value in graph.inputs if str(value.name).startswith(DEEPSTACK)]
    present: list[ir.Value] = []
    past = iter(graph.inputs[first:])
    for index, layer in enumerate(layers):
        enters_last, own = hidden, range(first, len(layer.graph.inputs))
        number = kinds.index(layer)
        hidden, *new_rows = graph.add(
            layer,
            [hidden, *shared, *itertools.islice(past, len(own))],
            varying=(0, *own),
            weights=f"layers.{index}.",
            own_suffix=f".{index}",
            shared_suffix=f".kind{number}" * (number > 0),
        )
        present += new_rows
        if index < len(planes):
            both, name = [hidden, planes[index]], f"with_deepstack.{index}"
            hidden = add_node(graph.graph, "Add", both, name, hidden.dtype, hidden.shape)
    results = [hidden, *present]
    if spec.outputs[-1].name == PREVIOUS:
        # Identity, because with one layer it is an input of the graph, which cannot be an output, too
        kind, shape = enters_last.dtype, enters_last.shape
        results.append(add_node(graph.graph, "Identity", [enters_last], "last_input", kind, shape))
    return graph.model(results, spec.outputs, like=layers[0])


class Copies:
    """A graph under construction."""

    def __init__(self, inputs: Sequence[TensorSpec]) -> None:
        self.inputs = [_graph_value(spec) for spec in inputs]
        self.graph = ir.Graph(self.inputs, [], nodes=[])
        self._shared: dict[int, dict[ir.Value, ir.Value]] = {}
        """Values that all copies of a trace share, by the trace's id."""

    def add(
        self,
        source: ir.Model,
        inputs: Sequence[ir.Value],
        *,
        varying: Collection[int],
        weights: str,
        own_suffix: str,
        shared_suffix: str = "",
    ) -> list[ir.Value]:
        """Append a copy of ``source``, the trace of one part, which stays as it is, and return its outputs.

        ``varying`` are the indices of the ``inputs`` that differ between copies; names of values that differ get ``own_suffix``,
        those that all copies share ``shared_suffix``, and those of weights start with ``weights`` instead of ``LAYER_PREFIX``.
        """
        graph = source.graph
        own = _own_values(graph, varying)
        is_first = id(source) not in self._shared
        shared = self._shared.setdefault(id(source), {})
        values = {**shared, **dict(zip(graph.inputs, inputs))}
        for value in graph.initializers.values():
            name = str(value.name)
            if value in own:
                values[value] = _copied(value, weights + name.removeprefix(LAYER_PREFIX))
            elif is_first:  # a buffer has no value yet and is found by its name, which therefore stays
                shared[value] = values[value] = _copied(
                    value, name + shared_suffix * (value.const_value is not None)
                )
            else:
                continue
            self.graph.initializers[str(values[value].name)] = values[value]
        for node in graph:
            is_own = node.outputs[0] in own
            if not is_own and not is_first:
                continue
            self.graph.append(_repeat(node, values, suffix=own_suffix if is_own else shared_suffix))
            if not is_own:
                shared |= {value: values[value] for value in node.outputs}
        return [values[value] for value in graph.outputs]

    def model(self, values: Iterable[ir.Value], outputs: Sequence[TensorSpec], *, like: ir.Model) -> ir.Model:
        """Return the graph with ``values`` as its outputs; opset and name are those of ``like``."""
        results = list(values)
        for value, spec in zip(results, outputs):
            named = _graph_value(spec)
            value.name, value.shape, value.type = named.name, named.shape, named.type
        self.graph.outputs.extend(results)
        self.graph.opset_imports.update(like.opset_imports)
        self.graph.name = like.graph.name
        return ir.Model(self.graph, ir_version=like.ir_version)


class Traceable(nn.Module):
    """A module with weights whose names start with ``LAYER_PREFIX``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([module])

    def forward(self, *inputs: object) -> object:
        """Return the module's results."""
        return self.layers[0](*inputs)


def _own_values(graph: ir.Graph, varying: Collection[int]) -> set[ir.Value]:
    """Return the values that differ between copies: weights, varying inputs, and all values computed from them.

    Shapes do not differ, so values computed from shapes alone, such as the decoder's mask, are shared.
    """
    own = {graph.inputs[index] for index in varying}
    own |= {value for name, value in graph.initializers.items() if name.startswith(LAYER_PREFIX)}
    for node in graph:
        if node.op_type != "Shape" and any(value in own for value in node.inputs):
            own |= set(node.outputs)
    return own


def _copied(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)


def _repeat(node: ir.Node, values: dict[ir.Value, ir.Value], *, suffix: str) -> ir.Node:
    """Return a copy of ``node`` that reads the mapped ``values``, and add its outputs to them."""
    outputs = [_copied(value, f"{value.name}{suffix}") for value in node.outputs]
    values |= dict(zip(node.outputs, outputs))
    return ir.Node(
        node.domain,
        node.op_type,
        [None if value is None else values[value] for value in node.inputs],
        [_own(attribute) for attribute in node.attributes.values()],
        overload=node.overload,
        outputs=outputs,
        name=f"{node.name}{suffix}",
    )


def _own(attribute: ir.Attr) -> ir.Attr:
    """Return an attribute for another node: a graph, as the body of a Scan, belongs to one."""
    if attribute.type != ir.AttributeType.GRAPH:
        return attribute
    return ir.AttrGraph(attribute.name, attribute.as_graph().clone())


def _graph_value(spec: TensorSpec) -> ir.Value:
    """Return the graph input or output that ``spec`` describes."""
    kind = ir.TensorType(ir.DataType[IR_FROM_DTYPE[spec.dtype]])
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=kind)
