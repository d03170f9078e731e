"""Traces all graphs of a bundle from a family's modules, without reading weights."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from trio_edge.export.checkpoints.checkpoint import canonical_name
from trio_edge.export.checkpoints.weights import StoredName
from trio_edge.export.graphs.assembly.copies import Traceable, first_past, stack_layers
from trio_edge.export.graphs.assembly.onnx_graph import TracedGraph, dynamic_axes, example_input, trace_graph
from trio_edge.export.graphs.attention import DecoderRange
from trio_edge.export.graphs.probe import Probe, Saliency
from trio_edge.export.graphs.state_layers import num_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnx_ir as ir
    from torch import nn

    from trio_edge.export.graphs.assembly.copies import LayeredModule
    from trio_edge.export.plan import ExportPlan
    from trio_edge.export.tracing.wiring import Outline
    from trio_edge.runtime.bundle.manifest import GraphSpec

# Axes are traced at their largest size plus this, by the last letter of the symbol, so that no two axes are equal for
# torch.export, and none is 0 or 1. P stays a multiple of the four patches of a Qwen token.
_MORE = {"B": 3, "N": 5, "P": 148, "W": 7, "M": 3, "T": 3, "S": 37, "C": 41, "R": 1, "F": 74, "L": 5}
_WITH_CONSTANTS = ("vision", "clip_text", "reduce", "select")
"""Roles whose axes with one size in all profiles are constant, because TensorRT optimizes better with constants."""


def trace_graphs(
    plan: ExportPlan, outlines: Iterable[Outline], *, step: Callable[[str], None]
) -> list[TracedGraph]:
    """Return the graphs that ``outlines`` describe, in their order; called under FakeTensorMode.

    ``step`` gets a line for each whole graph.
    """
    tracer, traced = Tracer(plan), []
    for outline in outlines:
        if outline.piece in (None, "layers", "logits"):
            step(f"tracing {outline.spec.name}")
        traced.append(tracer.trace(outline))
    return traced


class Tracer:
    """Traces the graphs of one export; parts that several graphs repeat are traced once."""

    def __init__(self, plan: ExportPlan) -> None:
        self._model, self._opset = plan.model, plan.options.opset
        parameters = plan.model.root.named_parameters()
        self._names = {id(tensor): canonical_name(name) for name, tensor in parameters}
        if plan.clip_graphs is not None:
            self._names |= plan.clip_graphs.names
        self._known: dict[Any, ir.Model] = {}
        """Traces of a decoder layer, and of the halves of a probe by form; stages differ only in their weights."""

    def trace(self, outline: Outline) -> TracedGraph:
        """Return the graph with the sources of its initializers, which have the names of the module's."""
        model = self._model_of(outline)
        parameters = dict(outline.module.named_parameters(remove_duplicate=False))
        known = {"rotary.inv_freq": self._model.inv_freq, **outline.constants}
        weights, constants = {}, {}
        for name, value in model.graph.initializers.items():
            if name in parameters:
                weights[name] = StoredName(self._names[id(parameters[name])])
            elif value.const_value is None:
                constants[name] = known[name]
        return TracedGraph(
            spec=outline.spec, model=model, weights=weights, constants=constants, piece=outline.piece
        )

    def _model_of(self, outline: Outline) -> ir.Model:
        spec, module = outline.spec, outline.module
        if isinstance(module, DecoderRange):
            return stack_layers([self._layer(spec, index, module) for index in range(spec.num_layers)], spec)
        if spec.role == "vision" and self._model.vision.layered is not None:
            return self._layered(self._model.vision.layered, spec)
        if isinstance(module, (Probe, Saliency)):
            form = type(module), module.saliency.form, module.saliency.is_quantized
            if form not in self._known:
                self._known[form] = self._traced(module, spec)
            return self._known[form].clone()
        return self._traced(module, spec)

    def _layer(self, spec: GraphSpec, index: int, module: DecoderRange) -> ir.Model:
        """Return the trace of a layer of a range; the layers of one structure share that of the first."""
        layer = module.layers[index]
        if (kind := _structure(layer)) not in self._known:
            first, count = first_past(spec), num_kept(layer)
            before = sum(map(num_kept, module.layers[:index]))
            inputs = *spec.inputs[:first], *spec.inputs[first + before :][:count]
            outputs = spec.outputs[0], *spec.outputs[1 + before :][:count]
            one = msgspec.structs.replace(spec, inputs=inputs, outputs=outputs)
            self._known[kind] = self._traced(DecoderRange([layer], module.rotary), one)
        return self._known[kind]

    def _layered(self, layered: LayeredModule, spec: GraphSpec) -> ir.Model:
        """Return a graph of many layers, each kind of which is traced once."""
        traces = {
            name: self._traced(
                Traceable(part.module),
                msgspec.structs.replace(spec, inputs=part.inputs, outputs=part.outputs),
            )
            for name, part in layered.parts.items()
        }
        return layered.assemble(traces, inputs=spec.inputs, outputs=spec.outputs)

    def _traced(self, module: nn.Module, spec: GraphSpec) -> ir.Model:
        """Return the trace of ``module``, whose ``forward`` takes the inputs of ``spec``."""
        found = {name: {profile.sizes[name] for profile in spec.profiles} for name in spec.profiles[0].sizes}
        sizes, dims = {}, {}
        for name, values in found.items():
            sizes[name] = max(values) + _MORE[name[-1]]
            if spec.role not in _WITH_CONSTANTS:
                dims[name] = torch.export.Dim(name)  # named, so that names of values are stable
            elif len(values) > 1:
                dims[name] = torch.export.Dim.DYNAMIC
            else:
                sizes[name] = max(values)
        axes: tuple[Any, ...] = tuple(dynamic_axes(tensor, dims=dims) for tensor in spec.inputs)
        *named, last = inspect.signature(module.forward).parameters.values()
        if last.kind is last.VAR_POSITIONAL and len(axes) > len(named):
            axes = (*axes[: len(named)], axes[len(named) :])
        return trace_graph(
            module,
            args=tuple(example_input(tensor, trace_sizes=sizes) for tensor in spec.inputs),
            dynamic_shapes=axes,
            inputs=spec.inputs,
            outputs=spec.outputs,
            opset=self._opset,
        )


def _structure(layer: nn.Module) -> tuple[type, tuple[tuple[str, tuple[int, ...]], ...]]:
    return type(layer), tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())
