"""All device memory of the decoder but the weights, at addresses that never change, and what each graph binds to it.

Every stage writes its output where no other stage does, so that a stage can be repaired and the later ones run again.
Only the new KV rows of a prefill share one place: they are copied away before the next range runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import PREVIOUS
from trio_edge.runtime.devices.blocks import Block, Stack
from trio_edge.runtime.devices.interface import DeviceTensor, find_profile, shape_at
from trio_edge.runtime.sampling import TopTokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile, TensorSpec
    from trio_edge.runtime.devices.interface import Allocator, Device

TOP = ("top_logits", "top_ids")


class StepInputs(NamedTuple):
    """What a decode step is told, in pinned memory."""

    embedding: NDArray[Any]
    """[D]."""
    positions: list[NDArray[np.int32]]
    """[A] of each layer range."""
    past_lengths: list[NDArray[np.int32]]
    """[1] of each layer range."""


@final
class DecoderBuffers:
    """Inputs, results, KV caches and what lies between the graphs."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate everything for the largest profiles of ``manifest``'s graphs."""
        self._manifest = manifest
        self.ranges, self.selects, self.head = manifest.ranges, manifest.selects, manifest.graph("head")
        self._head_outputs = {tensor.name: tensor for tensor in self.head.outputs}
        self.caches = [KVCache(allocator, spec) for spec in self.ranges]
        self.embeds = self._largest(allocator, self.ranges[0], self.ranges[0].inputs[0])
        self.hidden_out = [self._largest(allocator, spec, spec.outputs[0]) for spec in self.ranges]
        self.previous = [
            self._largest(allocator, spec, tensor)
            for spec in self.ranges
            for tensor in spec.outputs
            if tensor.name == PREVIOUS
        ]
        self.kept_hidden = [self._largest(allocator, spec, spec.outputs[0]) for spec in self.selects]
        self.kept_positions = [self._largest(allocator, spec, spec.outputs[1]) for spec in self.selects]
        rows = [max(profile.sizes["S"] for profile in spec.profiles) for spec in self.ranges]
        sizes = [NewRows(0, spec, rows=most).stack.num_bytes for spec, most in zip(self.ranges, rows)]
        self._new_rows = allocator.allocate(max(sizes), purpose="new KV rows of a prefill")
        self.new_row = []
        for spec in self.ranges:
            size = NewRows(0, spec, rows=1).stack.num_bytes
            address = allocator.allocate(size, purpose=f"the new KV row of {spec.name}")
            self.new_row.append(NewRows(address, spec, rows=1))
        width = manifest.dimensions.hidden_size
        text = allocator.allocate_pinned(
            manifest.text_buckets[-1] * width * np.dtype(manifest.dtype).itemsize, purpose="text embeddings"
        )
        self.text = text.view(manifest.dtype).reshape(-1, width)
        """Pinned rows [largest bucket, D]: the text before and after the picture, one behind the other."""
        self.inputs = Block(allocator, self._input_fields(), purpose="inputs of a prefill")
        self.results = Block(allocator, self._result_fields(), purpose="results of a prefill")
        self.step = Block(allocator, self._step_fields(), purpose="inputs of a decode step")
        self.step_top = Block(allocator, self._head_fields(TOP), purpose="results of a decode step")
        self.step_logits = Block(allocator, self._head_fields(("logits",)), purpose="logits")

    # Inputs and results as (dtype, largest shape) by name; stages and ranges are numbered from 0.

    def _input_fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        fields: dict[str, tuple[str, tuple[int, ...]]] = {
            "position_ids": ("int32", _most(self.ranges[0], self.ranges[0].inputs[1])),
            "zero": ("int32", (1,)),
            "last_row": ("int32", (1,)),
            "prompt_num_visual": ("int32", (1,)),
            "prompt_length": ("int32", (1,)),
        }
        for stage, spec in enumerate(self.selects):
            fields[f"visual_rows.{stage}"] = ("int32", _most(spec, spec.inputs[2]))
            fields[f"num_visual.{stage}"] = ("int32", (1,))
            fields[f"length.{stage}"] = ("int32", (1,))
        return fields

    def _result_fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        fields = self._head_fields(("logits", *TOP))
        for stage, spec in enumerate(self.selects):
            for tensor in spec.outputs[2:]:
                fields[f"{tensor.name}.{stage}"] = (tensor.dtype, _most(spec, tensor))
        return fields

    def _head_fields(self, names: tuple[str, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        found = self._head_outputs
        return {name: (found[name].dtype, _most(self.head, found[name])) for name in names}

    def _step_fields(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        manifest = self._manifest
        fields: dict[str, tuple[str, tuple[int, ...]]] = {
            "embedding": (manifest.dtype, (1, 1, manifest.dimensions.hidden_size)),
            "last_row": ("int32", (1,)),
        }
        for index in range(len(self.ranges)):
            fields[f"position_ids.{index}"] = ("int32", (manifest.position_axes, 1))
            fields[f"past_length.{index}"] = ("int32", (1,))
        return fields

    @staticmethod
    def _largest(allocator: Allocator, spec: GraphSpec, tensor: TensorSpec) -> DeviceTensor:
        shape = _most(spec, tensor)
        size = math.prod(shape) * np.dtype(tensor.dtype).itemsize
        address = allocator.allocate(size, purpose=f"{tensor.name} of {spec.name}")
        return DeviceTensor(address, shape, tensor.dtype)

    # What each graph binds, by tensor name.

    def new_rows(self, index: int, rows: int) -> NewRows:
        """Return where range ``index`` writes the KV rows of a prefill."""
        return NewRows(self._new_rows, self.ranges[index], rows=rows)

    def range_tensors(self, index: int, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of layer range ``index`` in a prefill."""
        spec, rows = self.ranges[index], profile.sizes["S"]
        tensors = {
            spec.inputs[0].name: self.embeds if index == 0 else self.kept_hidden[index - 1],
            "position_ids": self._positions(index),
            "past_length": self.inputs.tensor("zero", (1,)),
            "hidden_states_out": self.hidden_out[index],
            **self.caches[index].no_rows(),
            **self.new_rows(index, rows).outputs(),
        }
        if any(tensor.name == PREVIOUS for tensor in spec.outputs):
            tensors[PREVIOUS] = self.previous[index]
        return _at_profile(spec, tensors, profile)

    def select_tensors(self, stage: int, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the select graph of ``stage``."""
        spec = self.selects[stage]
        tensors = {
            "hidden_states": self.hidden_out[stage],
            "position_ids": self._positions(stage),
            "visual_rows": self.inputs.tensor(f"visual_rows.{stage}", ()),
            "num_visual": self.inputs.tensor(f"num_visual.{stage}", ()),
            "length": self.inputs.tensor(f"length.{stage}", ()),
            "prompt_embeds": self.embeds,
            "prompt_num_visual": self.inputs.tensor("prompt_num_visual", ()),
            "prompt_length": self.inputs.tensor("prompt_length", ()),
            "kept_hidden_states": self.kept_hidden[stage],
            "kept_position_ids": self.kept_positions[stage],
            **{tensor.name: self.results.tensor(f"{tensor.name}.{stage}", ()) for tensor in spec.outputs[2:]},
        }
        if self.previous:
            tensors[PREVIOUS] = self.previous[stage]
        return _at_profile(spec, tensors, profile)

    def head_tensors(self, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of the head in a prefill."""
        results = {name: self.results.tensor(name, ()) for name in ("logits", *TOP)}
        inputs = {"hidden_states": self.hidden_out[-1], "last_row": self.inputs.tensor("last_row", ())}
        return _at_profile(self.head, inputs | results, profile)

    def step_tensors(self, index: int) -> tuple[Profile, dict[str, DeviceTensor]]:
        """Return profile and tensors of layer range ``index`` in a decode step."""
        spec, cache = self.ranges[index], self.caches[index]
        profile = find_profile(spec, {"S": 1, "C": cache.capacity})
        tensors = {
            spec.inputs[0].name: self.step.tensor("embedding", ())
            if index == 0
            else self.hidden_out[index - 1],
            "position_ids": self.step.tensor(f"position_ids.{index}", ()),
            "past_length": self.step.tensor(f"past_length.{index}", ()),
            "hidden_states_out": self.hidden_out[index],
            **cache.all_rows(),
            **self.new_row[index].outputs(),
        }
        if any(tensor.name == PREVIOUS for tensor in spec.outputs):
            tensors[PREVIOUS] = self.previous[index]
        return profile, _at_profile(spec, tensors, profile)

    def sent_by_step(self) -> StepInputs:
        """Return what the host writes before each decode step: views, made once as a step takes microseconds."""
        axes, count = self._manifest.position_axes, range(len(self.ranges))
        return StepInputs(
            embedding=self.step.host("embedding", (self._manifest.dimensions.hidden_size,)),
            positions=[self.step.host(f"position_ids.{index}", (axes,)) for index in count],
            past_lengths=[self.step.host(f"past_length.{index}", (1,)) for index in count],
        )

    def top(self, block: Block) -> TopTokens:
        """Return the most likely tokens in ``block``, the results of a prefill or a decode step: views."""
        logits, ids = (block.host(name, _most(self.head, self._head_outputs[name])) for name in TOP)
        return TopTokens(ids=ids, logits=logits)

    def step_head_tensors(self) -> tuple[Profile, dict[str, DeviceTensor]]:
        """Return profile and tensors of the head in a decode step."""
        profile = find_profile(self.head, {"S": 1})
        tensors = {
            "hidden_states": self.hidden_out[-1],
            "last_row": self.step.tensor("last_row", ()),
            "logits": self.step_logits.tensor("logits", ()),
            **{name: self.step_top.tensor(name, ()) for name in TOP},
        }
        return profile, _at_profile(self.head, tensors, profile)

    def _positions(self, index: int) -> DeviceTensor:
        return self.inputs.tensor("position_ids", ()) if index == 0 else self.kept_positions[index - 1]


def _most(spec: GraphSpec, tensor: TensorSpec) -> tuple[int, ...]:
    """Return the shape that has room for the tensor in every profile."""
    shapes = [shape_at(tensor.shape, profile) for profile in spec.profiles]
    return max(shapes, key=math.prod)


def _at_profile(
    spec: GraphSpec, tensors: Mapping[str, DeviceTensor], profile: Profile
) -> dict[str, DeviceTensor]:
    """Return the tensors that ``spec`` has, at their shapes in ``profile``."""
    return {
        tensor.name: tensors[tensor.name]._replace(shape=shape_at(tensor.shape, profile))
        for tensor in (*spec.inputs, *spec.outputs)
    }


# KV buffers of one decoder layer range: allocated once, written row by row on the device, read where they lie.


@final
class KVCache:
    """Keys and values of the layers of one range, [1, G, C, E] each, of which ``length`` rows are valid.

    A range's graph returns its new rows in a stack of their own (``NewRows``); ``append`` copies them behind the valid ones.
    """

    def __init__(self, allocator: Allocator, spec: GraphSpec) -> None:
        """Allocate the buffers.

        Args:
            allocator: Gives the memory.
            spec: The range's graph; its inputs name the layers, its decode profile has the capacity C.
        """
        past = [tensor for tensor in spec.inputs if tensor.name.startswith("past_key_values.")]
        self.capacity = max(profile.sizes["C"] for profile in spec.profiles)
        self.length = 0
        self._names = [tensor.name for tensor in past]
        shape = tuple(self.capacity if axis == "C" else int(axis) for axis in past[0].shape)
        size = Stack(0, count=len(past), shape=shape, dtype=past[0].dtype).num_bytes
        address = allocator.allocate(size, purpose=f"the KV cache of {spec.name}")
        self._stack = Stack(address, count=len(past), shape=shape, dtype=past[0].dtype)

    @property
    def used_bytes(self) -> int:
        """Bytes of the valid rows."""
        return self._stack.bytes_per_row * self.length

    def clear(self) -> None:
        """Forget all rows; the buffers stay."""
        self.length = 0

    def no_rows(self) -> dict[str, DeviceTensor]:
        """Return the graph inputs of a prefill: no past."""
        return {name: self._stack.empty(index) for index, name in enumerate(self._names)}

    def all_rows(self) -> dict[str, DeviceTensor]:
        """Return the graph inputs of a decode step: the whole buffers."""
        return {name: self._stack.tensor(index) for index, name in enumerate(self._names)}

    def append(self, device: Device, new: NewRows, *, num_rows: int) -> None:
        """Enqueue the copy of the first ``num_rows`` new rows behind the valid ones.

        Raises:
            ShapeError: If they do not fit.
        """
        end = self.length + num_rows
        if end > self.capacity:
            raise ShapeError(
                f"KV cache: expected at most {self.capacity} rows, got {end}; export with a larger --max-new-tokens"
            )
        new.stack.copy_to(device, self._stack, first_row=self.length, num_rows=num_rows)
        self.length = end


@final
class NewRows:
    """Where a layer range writes keys and values of the rows it has just seen, [1, G, S, E] each."""

    def __init__(self, address: int, spec: GraphSpec, *, rows: int) -> None:
        """Lay the outputs of ``spec`` out from ``address`` on, for S = ``rows``."""
        present = [tensor for tensor in spec.outputs if tensor.name.startswith("present.")]
        shape = tuple(rows if axis == "S" else int(axis) for axis in present[0].shape)
        self.stack = Stack(address, count=len(present), shape=shape, dtype=present[0].dtype)
        self._names = [tensor.name for tensor in present]

    def outputs(self) -> dict[str, DeviceTensor]:
        """Return the graph outputs."""
        return {name: self.stack.tensor(index) for index, name in enumerate(self._names)}
