"""Traces all graphs of a bundle from a family's modules, without reading weights."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import msgspec
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.checkpoints.checkpoint import Checkpoint, canonical_name
from trio_edge.export.checkpoints.weights import StoredName
from trio_edge.export.graphs.assembly.layer_stack import stack_layers
from trio_edge.export.graphs.assembly.onnx_graph import dynamic_axes, example_input, trace
from trio_edge.export.graphs.assembly.traced import TracedGraph
from trio_edge.export.graphs.decoder_range import DecoderRange
from trio_edge.export.graphs.head import Head
from trio_edge.export.graphs.probe import Probe, Saliency
from trio_edge.export.graphs.reduce import FEATURE_NAMES, Reduce
from trio_edge.export.graphs.rope import RotaryTables
from trio_edge.export.graphs.select import Select
from trio_edge.export.graphs.tensors import (
    GraphTensors,
    gradient_tensors,
    head_tensors,
    probe_tensors,
    range_tensors,
    saliency_tensors,
    select_tensors,
    token_planes,
)
from trio_edge.export.quantize.unpacking import read_weight
from trio_edge.runtime.bundle.graph_io import (
    CLIP_IDS,
    CLIP_PATCHES,
    CLIP_TEXT,
    CLIP_TEXTS,
    DEEPSTACK_TOKENS,
    HAS_PREVIOUS,
    IS_NEWLINE,
    KEPT_TOKENS,
    NUM_TEXT,
    NUM_VISUAL,
    PREVIOUS_TOKENS,
    REDUCED_DEEPSTACK,
    REDUCED_TOKENS,
    TEXT_EMBEDS,
    TEXT_MARKS,
    VISUAL_TOKENS,
    num_candidates,
)
from trio_edge.runtime.bundle.manifest import GraphSpec, TensorSpec
from trio_edge.trio.methods import stage_method, token_method
from trio_edge.trio.saliency import CandidateHead, ProbeHead, key_value_gram
from trio_edge.trio.selectors.interface import other_inputs_of, stage_selector

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    import onnx_ir as ir
    from numpy.typing import NDArray
    from torch import nn

    from trio_edge.export.families.clip import ClipGraphs
    from trio_edge.export.plan import ExportPlan
    from trio_edge.runtime.bundle.manifest import DType, PieceName, Profile, Role
    from trio_edge.trio.cost.selections import SaliencyForm
    from trio_edge.trio.methods import StageMethod
    from trio_edge.trio.saliency import ProxySaliency

_MIN_TRACE_ROWS = 37  # any number that no other axis has
# Dynamic axes are traced at their largest size plus this, so that no two axes are equal for torch.export. P stays a multiple
# of the four patches of a Qwen token.
_MORE = {
    "vision": {"B": 3, "N": 5, "P": 148, "W": 7},
    "clip_text": {"M": 3},
    "reduce": {"N": 5, "T": 3, "M": 3},
    "select": {"N": 3, "S": _MIN_TRACE_ROWS, "R": 0, "F": 2 * _MIN_TRACE_ROWS},
}


_Pieces: TypeAlias = "dict[PieceName, TracedGraph]"


class _Tracer:
    """The state that the graphs of one export share while they are traced."""

    def __init__(self, plan: ExportPlan) -> None:
        self.model = plan.model
        self.checkpoint = plan.source.checkpoint
        self.layout = plan.layout
        self.dimensions = plan.dimensions
        parameters = plan.model.root.named_parameters()
        self.names = {id(tensor): canonical_name(name) for name, tensor in parameters}
        if plan.clip_graphs is not None:
            self.names |= plan.clip_graphs.names
        self.layer: ir.Model | None = None
        """Trace of one decoder layer, once there is one."""
        self.probes: dict[tuple[SaliencyForm, bool], list[ir.Model]] = {}
        """Traces of the two halves of a probe by form, of a quantized layer or not; stages differ only in their weights."""

    def spec(
        self,
        name: str,
        role: Role,
        tensors: GraphTensors,
        profiles: tuple[Profile, ...],
        *,
        first_layer: int | None = None,
        num_layers: int = 0,
    ) -> GraphSpec:
        """Return the description of a graph."""
        inputs, outputs = tensors
        return GraphSpec(
            name=name,
            role=role,
            file=f"{name}.onnx",
            inputs=inputs,
            outputs=outputs,
            weight_bytes=0,  # known when the graph is written
            profiles=profiles,
            first_layer=first_layer,
            num_layers=num_layers,
        )

    @property
    def method(self) -> StageMethod:
        """The selector of all stages."""
        return stage_method(self.layout.schedule.method)

    def rotary(self) -> RotaryTables:
        return RotaryTables(
            torch.empty(self.model.inv_freq.shape, dtype=torch.float32),
            attention_scaling=self.model.attention_scaling,
        )

    def graph(
        self,
        module: nn.Module,
        spec: GraphSpec,
        *,
        num_named: int | None = None,
        constants: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> TracedGraph:
        """Trace ``module`` and return the graph with the sources of its initializers."""
        return self.described(
            self.traced(module, spec, num_named=num_named), module, spec, constants=constants
        )

    def traced(self, module: nn.Module, spec: GraphSpec, *, num_named: int | None = None) -> ir.Model:
        """Return the trace of ``module``; its ``forward`` takes the inputs after the first ``num_named`` as ``*others``."""
        if spec.role == "probe":
            sizes, dims = _probe_sizes(spec)
        elif spec.role == "head":  # a named axis, as torch.export's own symbols would rename values
            sizes = {"S": _MIN_TRACE_ROWS, "L": 5}
            dims = {name: torch.export.Dim(name) for name in spec.profiles[0].sizes}
        else:
            sizes, dims = _trace_sizes(spec, several=_MORE[spec.role])
        axes = tuple(dynamic_axes(tensor, dims=dims) for tensor in spec.inputs)
        others = axes[num_named:] if num_named is not None else ()
        return trace(
            module,
            args=tuple(example_input(tensor, trace_sizes=sizes) for tensor in spec.inputs),
            dynamic_shapes=(*axes[:num_named], others) if others else axes,
            inputs=spec.inputs,
            outputs=spec.outputs,
            opset=self.layout.opset,
        )

    def described(
        self, model: ir.Model, module: nn.Module, spec: GraphSpec, *, constants: Mapping[str, NDArray[Any]]
    ) -> TracedGraph:
        """Return ``model`` with the sources of its initializers, which have the names of ``module``."""
        parameters = dict(module.named_parameters(remove_duplicate=False))
        weights, values = {}, {}
        for name, value in model.graph.initializers.items():
            if name in parameters:
                weights[name] = StoredName(self.names[id(parameters[name])])
            elif value.const_value is None:
                values[name] = constants[name]
        return TracedGraph(spec=spec, model=model, weights=weights, constants=values)


def trace_graphs(
    plan: ExportPlan, *, is_quantized: Callable[[Role], bool], step: Callable[[str], None]
) -> list[TracedGraph]:
    """Return all graphs of the bundle in the order of a prefill; called under FakeTensorMode.

    Pieces of one graph follow each other, first the one with the joined graph's role. Weights are read only for constants
    that are computed from them (grouped-query saliency). ``is_quantized`` tells whether the linear layers of a role are
    going to be quantized.
    """
    tracer = _Tracer(plan)
    step("tracing vision")
    graphs = [_vision(tracer)]
    if plan.clip_graphs is not None:
        step("tracing clip_text")
        graphs.append(_clip_text(tracer, plan.clip_graphs))
    if plan.selector is not None:
        step("tracing reduce")
        graphs.append(_reduce(tracer, plan, before=[graph.spec for graph in graphs]))
    ranges = plan.layout.layer_ranges(plan.dimensions.num_layers)
    stages = _stages(tracer, step, is_quantized=is_quantized)
    for index, layers in enumerate(ranges):
        role = _range_role(index, len(ranges))
        name = f"segment_{index}" if role == "segment" else role
        probe: _Pieces = {}
        if index > 0:
            select, probe = stages[index - 1]
            if probe and is_quantized(role):
                graphs.append(probe.pop("saliency"))
            graphs.append(select)
        step(f"tracing {name}")
        main = _range(tracer, index, layers, name=name, role=role)
        graphs += _together(name, role, {"layers": main, **probe}) if probe else [main]
    step("tracing head")
    if not any(probe for _, probe in stages):
        return [*graphs, _head(tracer)]
    head = _head(tracer, is_shared=True, has_candidates=is_quantized("head"))
    if is_quantized("head"):
        return [*graphs, head, _candidate_gradient(tracer)]
    return [*graphs, *_together("head", "head", {"logits": head, "gradient": _gradient(tracer)})]


def _together(name: str, role: Role, pieces: _Pieces) -> list[TracedGraph]:
    """Return ``pieces`` as pieces of the graph ``name``."""
    return [
        replace(
            graph,
            piece=piece,
            spec=msgspec.structs.replace(graph.spec, name=name, role=role, file=f"{name}.{piece}.onnx"),
        )
        for piece, graph in pieces.items()
    ]


def _range_role(index: int, num_ranges: int) -> Role:
    if index == 0:
        return "prefix"
    return "suffix" if index == num_ranges - 1 else "segment"


def _vision(tracer: _Tracer) -> TracedGraph:
    vision = tracer.model.vision
    tensors = GraphTensors(vision.inputs, vision.outputs)
    spec = tracer.spec("vision", "vision", tensors, tracer.layout.vision_profiles())
    if vision.layered is None:
        return tracer.graph(vision.module, spec, constants=vision.constants)
    traces = {
        name: tracer.traced(
            part.traceable(),
            msgspec.structs.replace(spec, inputs=part.inputs, outputs=part.outputs),
            num_named=0,
        )
        for name, part in vision.layered.parts.items()
    }
    model = vision.layered.assemble(traces, inputs=spec.inputs, outputs=spec.outputs)
    return tracer.described(model, vision.module, spec, constants=vision.constants)


def _trace_sizes(spec: GraphSpec, *, several: Mapping[str, int]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes to trace at, and torch.export's dynamic dimensions of the axes with several sizes.

    An axis with one size in all profiles is traced as a number, because TensorRT optimizes better with constants.
    """
    values = {name: {profile.sizes[name] for profile in spec.profiles} for name in spec.profiles[0].sizes}
    sizes = {
        name: max(found) + several[name] if len(found) > 1 else min(found) for name, found in values.items()
    }
    dims = {name: torch.export.Dim.DYNAMIC for name, found in values.items() if len(found) > 1}
    return sizes, dims


def _clip_text(tracer: _Tracer, clip: ClipGraphs) -> TracedGraph:
    length, dtype = clip.text.position_embedding.num_embeddings, tracer.layout.dtype
    ids = TensorSpec(name=CLIP_IDS, dtype="int32", shape=("M", length))
    texts = TensorSpec(name=CLIP_TEXTS, dtype=dtype, shape=("M", length, clip.projection_size))
    spec = tracer.spec(
        CLIP_TEXT, CLIP_TEXT, GraphTensors((ids,), (texts,)), tracer.layout.clip_text_profiles()
    )
    return tracer.graph(clip.text, spec)


def _reduce(tracer: _Tracer, plan: ExportPlan, *, before: Sequence[GraphSpec]) -> TracedGraph:
    layout, hidden = tracer.layout, tracer.dimensions.hidden_size
    assert plan.selector is not None  # else there is no such graph
    assert plan.options.token_method is not None
    num_keep, row = plan.selector.num_keep, token_method(plan.options.token_method)
    reads_text = row.reads_text and plan.clip_graphs is None
    outputs_before = {tensor.name: tensor for graph in before for tensor in graph.outputs}
    planes = [outputs_before[f"{DEEPSTACK_TOKENS}{index}"] for index in range(tracer.model.num_deepstack)]
    inputs = [
        outputs_before[VISUAL_TOKENS],
        TensorSpec(name=NUM_VISUAL, dtype="int32", shape=(1,)),
        TensorSpec(name=IS_NEWLINE, dtype="int32", shape=("N",)),
    ]
    if row.reads_features:
        inputs += [outputs_before[name] for name in FEATURE_NAMES]
    if reads_text:
        inputs += [
            TensorSpec(name=TEXT_EMBEDS, dtype=layout.dtype, shape=("T", hidden)),
            TensorSpec(name=NUM_TEXT, dtype="int32", shape=(1,)),
        ]
    if plan.clip_graphs is not None:
        texts = outputs_before[CLIP_TEXTS]
        marks = TensorSpec(name=TEXT_MARKS, dtype="int32", shape=texts.shape[:2])
        inputs += [outputs_before[CLIP_PATCHES], texts, marks]
    if row.reads_previous:
        inputs += [
            TensorSpec(name=PREVIOUS_TOKENS, dtype=layout.dtype, shape=inputs[0].shape),
            TensorSpec(name=HAS_PREVIOUS, dtype="int32", shape=(1,)),
        ]
    inputs += planes
    outputs = (
        TensorSpec(name=REDUCED_TOKENS, dtype=layout.dtype, shape=(num_keep, hidden)),
        TensorSpec(name=KEPT_TOKENS, dtype="int32", shape=(num_keep,)),
        *token_planes(REDUCED_DEEPSTACK, len(planes), rows=num_keep, width=hidden, dtype=layout.dtype),
    )
    profiles = layout.reduce_profiles(with_text=reads_text)
    spec = tracer.spec("reduce", "reduce", GraphTensors(tuple(inputs), outputs), profiles)
    return tracer.graph(Reduce(plan.selector, others=spec.input_names[3:]), spec, num_named=3)


def _range(tracer: _Tracer, index: int, layers: range, *, name: str, role: Role) -> TracedGraph:
    has_stage = bool(tracer.layout.schedule.stages) and role != "suffix"
    with_previous = has_stage and tracer.method.reads_previous
    num_deepstack = tracer.model.num_deepstack
    tensors = _range_tensors(tracer, layers, num_deepstack=num_deepstack, with_previous=with_previous)
    profiles = tracer.layout.range_profiles(index)
    spec = tracer.spec(name, role, tensors, profiles, first_layer=layers.start, num_layers=len(layers))
    if tracer.layer is None:
        tracer.layer = _one_layer(tracer)
    outputs = tensors.outputs
    layer_outputs, previous = (outputs[:-1], outputs[-1]) if with_previous else (outputs, None)
    model = stack_layers(
        tracer.layer,
        inputs=tensors.inputs,
        outputs=layer_outputs,
        num_layers=len(layers),
        num_planes=len(layers[: max(num_deepstack - layers.start, 0)]),
        last_input=previous,
    )
    module = DecoderRange([tracer.model.layers[layer] for layer in layers], tracer.rotary())
    return tracer.described(model, module, spec, constants={"rotary.inv_freq": tracer.model.inv_freq})


def _range_tensors(
    tracer: _Tracer, layers: range, *, num_deepstack: int, with_previous: bool = False
) -> GraphTensors:
    return range_tensors(
        layers,
        dimensions=tracer.dimensions,
        dtype=tracer.layout.dtype,
        kv_dtype=tracer.layout.dtype,  # export/quantize/cache.py changes it
        position_axes=tracer.model.position_axes,
        num_deepstack=num_deepstack,
        with_previous=with_previous,
    )


def _one_layer(tracer: _Tracer) -> ir.Model:
    """Return the trace of the first decoder layer; all layers have the same structure."""
    structures = {
        (type(layer), tuple((name, tuple(value.shape)) for name, value in layer.named_parameters()))
        for layer in tracer.model.layers
    }
    if len(structures) != 1:
        raise AssertionError(f"expected decoder layers of one structure, got {len(structures)}")
    inputs, outputs = _range_tensors(tracer, range(1), num_deepstack=0)
    symbols = {"S": torch.export.Dim("S"), "C": torch.export.Dim("C")}
    *args, key, value = (example_input(tensor, trace_sizes={"S": _MIN_TRACE_ROWS}) for tensor in inputs)
    *axes, key_axes, value_axes = (dynamic_axes(tensor, dims=symbols) for tensor in inputs)
    return trace(
        DecoderRange(tracer.model.layers[:1], tracer.rotary()),
        args=(*args, [(key, value)]),
        dynamic_shapes=(*axes, [(key_axes, value_axes)]),
        inputs=inputs,
        outputs=outputs,
        opset=tracer.layout.opset,
    )


def _stages(
    tracer: _Tracer, step: Callable[[str], None], *, is_quantized: Callable[[Role], bool]
) -> list[tuple[TracedGraph, _Pieces]]:
    """Return the select graph of each stage, and the two halves of its probe, if it has one."""
    result = []
    num_stages = len(tracer.layout.schedule.stages)
    for stage in range(num_stages):
        step(f"tracing select_{stage + 1}")
        rows = max(tracer.layout.visual_rows(stage))
        selector = stage_selector(
            tracer.model,
            tracer.layout.schedule,
            stage=stage,
            max_visual=rows,
            max_images=tracer.layout.max_images,
            is_quantized=is_quantized(_range_role(stage + 1, num_stages + 1)),
        )
        halves = _probe_halves(tracer, stage, selector.saliency) if tracer.method.has_probe else {}
        result.append((_select(tracer, stage, selector), halves))
    return result


def _select(tracer: _Tracer, stage: int, selector: Any) -> TracedGraph:
    layout, schedule = tracer.layout, tracer.layout.schedule
    layer_index, num_keep = schedule.stages[stage].layer, schedule.stages[stage].keep
    row, own = tracer.method, other_inputs_of(selector)
    tensors = select_tensors(
        num_keep,
        dimensions=tracer.dimensions,
        dtype=layout.dtype,
        position_axes=tracer.model.position_axes,
        with_previous=row.reads_previous,
        with_prompt=row.reads_prompt,
        with_saliency=row.has_probe,
        with_images=schedule.budget == "image",
        others=[
            TensorSpec(name=name, dtype=cast("DType", other.dtype), shape=other.shape)
            for name, other in own.items()
        ],
        planes=range(layer_index, tracer.model.num_deepstack),
    )
    has_prompt_rows = any("F" in tensor.shape for tensor in tensors.inputs)
    profiles = layout.select_profiles(stage, with_prompt=has_prompt_rows)
    spec = tracer.spec(f"select_{stage + 1}", "select", tensors, profiles, first_layer=layer_index)
    preserves = schedule.positions == "preserved"
    module = Select(selector, tracer.rotary(), preserve_positions=preserves, others=spec.input_names[5:])
    graph = tracer.graph(module, spec, num_named=5, constants={"rotary.inv_freq": tracer.model.inv_freq})
    return replace(graph, sources={name: other.place for name, other in own.items()})


def _probe_halves(tracer: _Tracer, stage: int, probe: ProxySaliency) -> _Pieces:
    """Return the two halves of a stage's probe."""
    options: Any = {
        "dimensions": tracer.dimensions,
        "dtype": tracer.layout.dtype,
        "position_axes": tracer.model.position_axes,
        "with_keys": probe.needs_keys,
        "with_mlp": not probe.is_quantized,
    }
    layer, layout = tracer.layout.schedule.stages[stage].layer, tracer.layout
    constants: dict[str, NDArray[Any]] = {"rotary.inv_freq": tracer.model.inv_freq}
    if probe.form != "direct":
        constants["saliency.key_value_gram"] = _gram(tracer.checkpoint, layer)
    specs = [
        tracer.spec(f"probe_{stage + 1}", "probe", tensors, profiles, first_layer=layer)
        for tensors, profiles in (
            (probe_tensors(**options), layout.probe_profiles(stage, "probe")),
            (saliency_tensors(**options), layout.probe_profiles(stage, "saliency")),
        )
    ]
    modules = Probe(probe, tracer.rotary()), Saliency(probe, tracer.rotary())
    key = (probe.form, probe.is_quantized)
    if key not in tracer.probes:
        tracer.probes[key] = [
            tracer.graph(modules[0], specs[0], constants=constants).model,
            tracer.graph(modules[1], specs[1], num_named=7, constants=constants).model,
        ]
    halves = [
        tracer.described(model.clone(), module, spec, constants=constants)
        for model, module, spec in zip(tracer.probes[key], modules, specs)
    ]
    return {"probe": halves[0], "saliency": halves[1]}


def _gradient(tracer: _Tracer) -> TracedGraph:
    """Return the head's piece of all probes."""
    tensors = gradient_tensors(dimensions=tracer.dimensions)
    spec = tracer.spec("gradient", "probe", tensors, tracer.layout.gradient_profiles())
    return tracer.graph(ProbeHead(tracer.model.final_norm, tracer.model.lm_head), spec)


def _candidate_gradient(tracer: _Tracer) -> TracedGraph:
    """Return the gradient of a quantized head."""
    tensors = gradient_tensors(dimensions=tracer.dimensions, candidates_dtype=tracer.layout.dtype)
    spec = tracer.spec("gradient", "probe", tensors, tracer.layout.gradient_profiles())
    return tracer.graph(CandidateHead(tracer.model.final_norm), spec)


def _probe_sizes(spec: GraphSpec) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the sizes to trace a piece of a probe at; all axes are dynamic, as they are 0 while it does not run."""
    more = {"S": _MIN_TRACE_ROWS, "N": 3, "R": 1}
    largest = {name: max(profile.sizes[name] for profile in spec.profiles) for name in spec.profiles[0].sizes}
    sizes = {name: size + more[name[-1]] for name, size in largest.items()}
    return sizes, {
        name: torch.export.Dim(name) for name in sizes
    }  # named, so that names of values are stable


def _gram(checkpoint: Checkpoint, layer: int) -> NDArray[np.float32]:
    prefix = f"language_model.layers.{layer}"
    with unset_fake_temporarily():
        key, value, norm = (
            read_weight(checkpoint, f"{prefix}.{name}.weight")
            for name in ("self_attn.k_proj", "self_attn.v_proj", "input_layernorm")
        )
        gram: NDArray[np.float32] = key_value_gram(key, value, norm).to(torch.float32).numpy()
        return gram


def _head(tracer: _Tracer, *, is_shared: bool = False, has_candidates: bool = False) -> TracedGraph:
    tensors = head_tensors(dimensions=tracer.dimensions, dtype=tracer.layout.dtype, is_shared=is_shared)
    profiles = tracer.layout.head_profiles(is_shared=is_shared)
    if has_candidates:
        profiles += tracer.layout.candidate_profiles()
    spec = tracer.spec("head", "head", tensors, profiles)
    module = Head(
        tracer.model.final_norm,
        tracer.model.lm_head,
        num_candidates=num_candidates(tracer.dimensions),
        is_shared=is_shared,
    )
    return tracer.graph(module, spec)
