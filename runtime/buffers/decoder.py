"""The decoder's device memory except the weights, at addresses that never change, and the tensors that each graph binds.

Every stage has its own output memory, so a stage can be repaired and the later stages run again. Only the new KV rows of
a prefill share one buffer: they are copied to the caches before the next range runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, final

import numpy as np

from trio_edge.runtime.buffers.blocks import Block, allocate_largest, allocate_tensor
from trio_edge.runtime.buffers.candidates import CandidateBuffers
from trio_edge.runtime.buffers.kv_cache import KVCache, NewRows
from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.devices.interface import find_profile, largest_shape, shape_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile, TensorSpec
    from trio_edge.runtime.devices.interface import Allocator, DeviceTensor

_TOP = (graph_io.TOP_LOGITS, graph_io.TOP_IDS)
_BETWEEN_HALVES = {
    graph_io.PROBE_OUTPUT: graph_io.PROBE_OUTPUT,
    graph_io.OUTPUT_GRADIENT: graph_io.GRADIENT,
    graph_io.PROBE_STATE: graph_io.GRADIENT_STATE,
    graph_io.PROBE_ATTENTION: graph_io.GRADIENT_ATTENTION,
    graph_io.PROBE_KEYS: graph_io.GRADIENT_KEYS,
    graph_io.SALIENCY_SCORES: graph_io.SALIENCY,
}
"""Outputs of a probe's pieces, and the inputs of later pieces that read them."""
_ONE = ("int32", (1,))
_Fields: TypeAlias = "dict[str, tuple[str, tuple[int, ...]]]"
"""Dtype and largest shape of a block's fields by name. Stages and ranges are numbered from 0, as in ``length.0``."""


class TopTokens(NamedTuple):
    """The most likely tokens, descending; equal logits come in any order."""

    ids: NDArray[np.int32]
    """[T]."""
    logits: NDArray[np.float32]
    """[T]."""


class StepInputs(NamedTuple):
    """The host's inputs of a decode step, in pinned memory."""

    embedding: NDArray[Any]
    """[D]."""
    positions: list[NDArray[np.int32]]
    """[A] of each layer range."""
    past_lengths: list[NDArray[np.int32]]
    """[1] of each layer range."""


@final
class DecoderBuffers:
    """Inputs, results, KV caches and the tensors between the graphs."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate everything for the largest profiles of ``manifest``'s graphs."""
        self._manifest = manifest
        self.ranges, self.selects, self.head = manifest.ranges, manifest.selects, manifest.graph("head")
        self.caches = [KVCache(allocator, spec) for spec in self.ranges]
        (self.embeds,) = _largest(allocator, self.ranges[:1], graph_io.EMBEDS)
        self.planes = [self._planes(allocator, index) for index in range(len(self.ranges))]
        """DeepStack planes that enter each range, by the layer whose output they are added to, in this or a later range."""
        row = (1, 1, manifest.dimensions.hidden_size)
        self._no_plane = allocate_tensor(
            allocator, self.ranges[0].tensor(graph_io.EMBEDS), row, graph="decode"
        )
        """DeepStack plane of a new token: one row of zeros, because the token is text."""
        self.hidden_out = _largest(allocator, self.ranges, graph_io.HIDDEN_OUT)
        self.previous = _largest(
            allocator, [spec for spec in self.ranges if _has_previous(spec)], graph_io.PREVIOUS
        )
        self.kept_hidden = _largest(allocator, self.selects, graph_io.KEPT_HIDDEN)
        self.kept_positions = _largest(allocator, self.selects, graph_io.KEPT_POSITIONS)
        self.kept_visual_rows = _largest(allocator, self.selects, graph_io.KEPT_VISUAL_ROWS)
        self.kept_visual_images: list[DeviceTensor] = []
        if manifest.schedule.budget == "image":
            self.kept_visual_images = _largest(allocator, self.selects, graph_io.KEPT_VISUAL_IMAGES)
        self.probes = [graph_io.probe_graphs(manifest, stage) for stage in range(len(self.selects))]
        """The graphs of the two halves of each stage's probe."""
        self.gradient = graph_io.gradient_graph(manifest)
        self._probe = self._probe_buffers(allocator)
        self.candidates = None
        if graph_io.reads_candidates(manifest):
            output = self._probe[graph_io.PROBE_OUTPUT]
            self.candidates = CandidateBuffers(manifest, allocator, output=output)
        # Ranges of a prefill run one after the other, so their new KV rows share one place.
        rows = [max(profile.sizes.get("S", 0) for profile in spec.profiles) for spec in self.ranges]
        sizes = [NewRows(0, spec, rows=most).stack.num_bytes for spec, most in zip(self.ranges, rows)]
        self._new_rows = allocator.allocate(max(sizes), purpose="new KV rows of a prefill")
        self.new_row = [_new_row(allocator, spec) for spec in self.ranges]
        self.text = _pinned_text(allocator, manifest)
        """Pinned rows [largest bucket, D], all text of a prompt in order."""
        self.inputs = Block(allocator, self._input_fields(), purpose="inputs of a prefill")
        self.results = Block(allocator, self._result_fields(), purpose="results of a prefill")
        self.step = Block(allocator, self._step_fields(), purpose="inputs of a decode step")
        # A step's logits have their own block: most steps download only the most likely tokens.
        self.step_top = Block(allocator, self._head_fields(*_TOP), purpose="results of a decode step")
        self.step_logits = Block(allocator, self._head_fields(graph_io.LOGITS), purpose="logits")

    def _planes(self, allocator: Allocator, index: int) -> dict[int, DeviceTensor]:
        """Return memory for the planes that enter range ``index``, with as many rows as its hidden states."""
        spec = self.ranges[index]
        hidden = spec.tensor(graph_io.HIDDEN if index else graph_io.EMBEDS)
        return {
            layer: allocate_largest(allocator, spec, hidden)
            for layer in range(spec.first_layer or 0, self._manifest.num_deepstack)
        }

    def _input_fields(self) -> _Fields:
        fields: _Fields = _fields(self.ranges[0], (graph_io.POSITIONS,))
        # "zero" is the past length of a prefill.
        fields |= dict.fromkeys(("zero", graph_io.LAST_ROW, graph_io.PROMPT_LENGTH), _ONE)
        for stage, spec in enumerate(self.selects):
            fields |= _fields(spec, (graph_io.NUM_VISUAL, graph_io.LENGTH), number=stage)
            if stage == 0:  # later stages read the output of the stage before
                fields |= _fields(
                    spec,
                    (graph_io.VISUAL_ROWS, *((graph_io.VISUAL_IMAGES,) if self.kept_visual_images else ())),
                )
            if graph_io.PROMPT_IS_VISUAL in spec.input_names:
                fields |= _fields(spec, (graph_io.PROMPT_IS_VISUAL,))
            if (probe := self.probes[stage]) is not None:
                fields |= _fields(probe[0], (graph_io.PROBE_ROWS,), number=stage)
        return fields

    def _probe_buffers(self, allocator: Allocator) -> dict[str, DeviceTensor]:
        """Return memory for the tensors between a probe's pieces; all stages share it."""
        largest: dict[str, tuple[GraphSpec, TensorSpec]] = {}
        halves = [spec for probe in self.probes if probe is not None for spec in probe]
        for spec in (*halves, *filter(None, (self.gradient,))):
            for tensor in spec.outputs:
                if tensor.name in _BETWEEN_HALVES:
                    known = largest.get(tensor.name)
                    if known is None or _num_elements(spec, tensor) > _num_elements(*known):
                        largest[tensor.name] = spec, tensor
        return {name: allocate_largest(allocator, *found) for name, found in largest.items()}

    def _result_fields(self) -> _Fields:
        fields = self._head_fields(graph_io.LOGITS, *_TOP)
        for stage, spec in enumerate(self.selects):
            fields |= _fields(spec, graph_io.SELECT_RESULTS, number=stage)
        return fields

    def _head_fields(self, *names: str) -> _Fields:
        """Return the block fields for results of the head on one row."""
        profile = self.head_profile(1)
        tensors = [self.head.tensor(name) for name in names]
        return {tensor.name: (tensor.dtype, shape_at(tensor.shape, profile)) for tensor in tensors}

    def _step_fields(self) -> _Fields:
        manifest = self._manifest
        fields: _Fields = {
            "embedding": (manifest.dtype, (1, 1, manifest.dimensions.hidden_size)),
            graph_io.LAST_ROW: _ONE,
        }
        for index in range(len(self.ranges)):
            fields[f"{graph_io.POSITIONS}.{index}"] = ("int32", (manifest.position_axes, 1))
            fields[f"{graph_io.PAST_LENGTH}.{index}"] = _ONE
        return fields

    # The tensors of each graph, by name.

    def new_rows(self, index: int, rows: int) -> NewRows:
        """Return the buffer for the KV rows of range ``index`` in a prefill."""
        return NewRows(self._new_rows, self.ranges[index], rows=rows)

    def range_tensors(self, index: int, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of layer range ``index`` in a prefill."""
        tensors = {
            graph_io.EMBEDS: self.embeds,
            graph_io.POSITIONS: self._positions(index),
            graph_io.PAST_LENGTH: self.inputs.tensor("zero"),
            **self.caches[index].no_rows(),
            **self.new_rows(index, profile.sizes["S"]).outputs(),
            **_named(graph_io.DEEPSTACK, self.planes[index]),
        }
        if index > 0:
            tensors[graph_io.HIDDEN] = self.kept_hidden[index - 1]
        return self._with_outputs(index, tensors, profile)

    def step_tensors(self, index: int) -> tuple[Profile, dict[str, DeviceTensor]]:
        """Return the profile and the tensors of layer range ``index`` in a decode step."""
        cache = self.caches[index]
        profile = find_profile(self.ranges[index], {"S": 1, "C": cache.capacity})
        tensors = {
            graph_io.EMBEDS: self.step.tensor("embedding"),
            graph_io.POSITIONS: self.step.tensor(f"{graph_io.POSITIONS}.{index}"),
            graph_io.PAST_LENGTH: self.step.tensor(f"{graph_io.PAST_LENGTH}.{index}"),
            **cache.all_rows(),
            **self.new_row[index].outputs(),
            **_named(graph_io.DEEPSTACK, dict.fromkeys(self.planes[index], self._no_plane)),
        }
        if index > 0:
            tensors[graph_io.HIDDEN] = self.hidden_out[index - 1]
        return profile, self._with_outputs(index, tensors, profile)

    def _with_outputs(
        self, index: int, tensors: dict[str, DeviceTensor], profile: Profile
    ) -> dict[str, DeviceTensor]:
        """Return the tensors of a range, with its output hidden states added."""
        spec = self.ranges[index]
        tensors[graph_io.HIDDEN_OUT] = self.hidden_out[index]
        if _has_previous(spec):
            tensors[graph_io.PREVIOUS] = self.previous[index]
        return self.at_profile(spec, tensors, profile)

    def select_tensors(self, stage: int, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the select graph of ``stage``."""
        tensors = {
            graph_io.HIDDEN: self.hidden_out[stage],
            graph_io.POSITIONS: self._positions(stage),
            graph_io.VISUAL_ROWS: self._visual_rows(stage),
            **{
                name: self.inputs.tensor(f"{name}.{stage}") for name in (graph_io.NUM_VISUAL, graph_io.LENGTH)
            },
            graph_io.PROMPT_EMBEDS: self.embeds,
            graph_io.PROMPT_LENGTH: self.inputs.tensor(graph_io.PROMPT_LENGTH),
            graph_io.KEPT_HIDDEN: self.kept_hidden[stage],
            graph_io.KEPT_POSITIONS: self.kept_positions[stage],
            graph_io.KEPT_VISUAL_ROWS: self.kept_visual_rows[stage],
            **{name: self.results.tensor(f"{name}.{stage}") for name in graph_io.SELECT_RESULTS},
            **_named(graph_io.DEEPSTACK, self.planes[stage]),
            **_named(graph_io.KEPT_DEEPSTACK, self.planes[stage + 1]),
        }
        if self.previous:
            tensors[graph_io.PREVIOUS] = self.previous[stage]
        if self.kept_visual_images:
            before = (
                self.inputs.tensor(graph_io.VISUAL_IMAGES)
                if stage == 0
                else self.kept_visual_images[stage - 1]
            )
            tensors |= {
                graph_io.VISUAL_IMAGES: before,
                graph_io.KEPT_VISUAL_IMAGES: self.kept_visual_images[stage],
            }
        if graph_io.PROMPT_IS_VISUAL in self.selects[stage].input_names:
            tensors[graph_io.PROMPT_IS_VISUAL] = self.inputs.tensor(graph_io.PROMPT_IS_VISUAL)
        if self._probe:
            tensors[graph_io.SALIENCY] = self._probe[graph_io.SALIENCY_SCORES]
        return self.at_profile(self.selects[stage], tensors, profile)

    def probe_tensors(self, stage: int, spec: GraphSpec, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the half of the probe of ``stage`` that ``spec`` has at ``profile``."""
        rows = self._visual_rows(stage)
        num_visual, length = (
            self.inputs.tensor(f"{name}.{stage}") for name in (graph_io.NUM_VISUAL, graph_io.LENGTH)
        )
        hidden, positions = self.hidden_out[stage], self._positions(stage)
        tensors = {
            **self._probe_tensors(),
            graph_io.PROBE_HIDDEN: hidden,
            graph_io.PROBE_POSITIONS: positions,
            graph_io.PROBE_VISUAL_ROWS: rows,
            graph_io.PROBE_ROWS: self.inputs.tensor(f"{graph_io.PROBE_ROWS}.{stage}"),
            graph_io.PROBE_LENGTH: length,
            graph_io.GRADIENT_HIDDEN: hidden,
            graph_io.GRADIENT_POSITIONS: positions,
            graph_io.GRADIENT_VISUAL_ROWS: rows,
            graph_io.GRADIENT_NUM_VISUAL: num_visual,
        }
        return self.at_profile(spec, tensors, profile)

    def gradient_tensors(self, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the head's gradient."""
        assert self.gradient is not None, "a bundle with a probe"
        candidates = {} if self.candidates is None else self.candidates.gradient_tensors()
        return self.at_profile(self.gradient, {**self._probe_tensors(), **candidates}, profile)

    def _probe_tensors(self) -> dict[str, DeviceTensor]:
        outputs = self._probe
        return outputs | {
            reader: outputs[name] for name, reader in _BETWEEN_HALVES.items() if name in outputs
        }

    def head_tensors(self, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the head in a prefill."""
        tensors = {name: self.results.tensor(name) for name in (graph_io.LOGITS, *_TOP)}
        tensors |= {
            graph_io.HIDDEN: self.hidden_out[-1],
            graph_io.LAST_ROW: self.inputs.tensor(graph_io.LAST_ROW),
        }
        return self.at_profile(self.head, tensors, profile)

    def head_profile(self, rows: int) -> Profile:
        """Return the profile of the head for ``rows`` rows of the last range."""
        return find_profile(self.head, {"S": rows, "L": 1} if graph_io.is_shared(self.head) else {"S": rows})

    def step_head_tensors(self) -> tuple[Profile, dict[str, DeviceTensor]]:
        """Return the profile and the tensors of the head in a decode step."""
        profile = self.head_profile(1)
        tensors = {name: self.step_top.tensor(name) for name in _TOP}
        tensors |= {
            graph_io.HIDDEN: self.hidden_out[-1],
            graph_io.LAST_ROW: self.step.tensor(graph_io.LAST_ROW),
        }
        tensors[graph_io.LOGITS] = self.step_logits.tensor(graph_io.LOGITS)
        return profile, self.at_profile(self.head, tensors, profile)

    def sent_by_step(self) -> StepInputs:
        """Return views of the inputs that the host writes before each decode step, made once to save time in each step."""
        axes, count = self._manifest.position_axes, range(len(self.ranges))
        return StepInputs(
            embedding=self.step.host("embedding", (self._manifest.dimensions.hidden_size,)),
            positions=[self.step.host(f"{graph_io.POSITIONS}.{index}", (axes,)) for index in count],
            past_lengths=[self.step.host(f"{graph_io.PAST_LENGTH}.{index}") for index in count],
        )

    def at_profile(
        self, spec: GraphSpec, tensors: Mapping[str, DeviceTensor], profile: Profile
    ) -> dict[str, DeviceTensor]:
        """Return the tensors of ``spec`` with their shapes in ``profile``; tensors of its other pieces have no elements."""
        nothing = self.inputs.tensor("zero")
        return {
            tensor.name: tensors.get(tensor.name, nothing)._replace(
                shape=shape_at(tensor.shape, profile), dtype=tensor.dtype
            )
            for tensor in spec.tensors
        }

    def _visual_rows(self, stage: int) -> DeviceTensor:
        return self.inputs.tensor(graph_io.VISUAL_ROWS) if stage == 0 else self.kept_visual_rows[stage - 1]

    def _positions(self, index: int) -> DeviceTensor:
        return self.inputs.tensor(graph_io.POSITIONS) if index == 0 else self.kept_positions[index - 1]


def top_tokens(block: Block) -> TopTokens:
    """Return views of the most likely tokens in ``block``, the results of a prefill or a decode step."""
    return TopTokens(
        ids=block.host(graph_io.TOP_IDS).reshape(-1), logits=block.host(graph_io.TOP_LOGITS).reshape(-1)
    )


def _named(prefix: str, planes: Mapping[int, DeviceTensor]) -> dict[str, DeviceTensor]:
    return {f"{prefix}{layer}": plane for layer, plane in planes.items()}


def _has_previous(spec: GraphSpec) -> bool:
    return any(tensor.name == graph_io.PREVIOUS for tensor in spec.outputs)


def _largest(allocator: Allocator, specs: Sequence[GraphSpec], name: str) -> list[DeviceTensor]:
    """Return memory for the tensor ``name`` of each graph, large enough for every profile."""
    return [allocate_largest(allocator, spec, spec.tensor(name)) for spec in specs]


def _fields(spec: GraphSpec, names: Sequence[str], *, number: int | None = None) -> _Fields:
    """Return the block fields for tensors of ``spec``; ``number`` is appended where several graphs have the same tensor."""
    tensors = [spec.tensor(name) for name in names]
    end = "" if number is None else f".{number}"
    return {f"{tensor.name}{end}": (tensor.dtype, largest_shape(spec, tensor)) for tensor in tensors}


def _new_row(allocator: Allocator, spec: GraphSpec) -> NewRows:
    size = NewRows(0, spec, rows=1).stack.num_bytes
    address = allocator.allocate(size, purpose=f"the new KV row of {spec.name}")
    return NewRows(address, spec, rows=1)


def _pinned_text(allocator: Allocator, manifest: Manifest) -> NDArray[Any]:
    shape = (manifest.text_buckets[-1], manifest.dimensions.hidden_size)
    num_bytes = shape[0] * shape[1] * np.dtype(manifest.dtype).itemsize
    text = allocator.allocate_pinned(num_bytes, purpose="text embeddings")
    return text.view(manifest.dtype).reshape(shape)


def _num_elements(spec: GraphSpec, tensor: TensorSpec) -> int:
    return math.prod(largest_shape(spec, tensor))
