"""The vision graph, and the selection before the decoder, on the device: a picture's arrays in, visual tokens there.

Where the selection compares the question in CLIP's space, its text tower runs between them.

Nothing waits for the device, except where the host must know what was kept before it can go on: see ``Pipeline``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.devices.blocks import Block
from trio_edge.runtime.devices.interface import DeviceTensor, Timeline, find_profile, shape_at
from trio_edge.runtime.images.interface import KEPT_PATCHES, KEPT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile, TensorSpec
    from trio_edge.runtime.devices.interface import Allocator, Device, LoadedGraphs

_ROLES = ("vision", "clip_text", "reduce")
_KEPT = (KEPT_PATCHES, KEPT_TOKENS)


@final
class VisionBuffers:
    """Inputs and outputs of the graphs before the decoder, at addresses that never change."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate everything for the largest profiles."""
        self.graphs = {spec.role: spec for spec in manifest.graphs if spec.role in _ROLES}
        self._blocks: dict[str, Block] = {}
        self._inner: dict[str, DeviceTensor] = {}
        """Outputs that stay on the device, by name."""
        for spec in self.graphs.values():
            for tensor in (*spec.inputs, *spec.outputs):
                self._allocate(allocator, spec, tensor)

    def _allocate(self, allocator: Allocator, spec: GraphSpec, tensor: TensorSpec) -> None:
        shape = max((shape_at(tensor.shape, profile) for profile in spec.profiles), key=math.prod)
        purpose = f"{tensor.name} of {spec.name}"
        if tensor in spec.outputs and tensor.name not in _KEPT:
            size = math.prod(shape) * np.dtype(tensor.dtype).itemsize
            address = allocator.allocate(size, purpose=purpose)
            self._inner[tensor.name] = DeviceTensor(address, shape, tensor.dtype)
        elif tensor.name not in self._inner:
            key = f"{spec.name} {tensor.name}"
            self._blocks[key] = Block(allocator, {tensor.name: (tensor.dtype, shape)}, purpose=purpose)

    def tensors(self, spec: GraphSpec, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of a graph at a profile."""
        found = {}
        for tensor in (*spec.inputs, *spec.outputs):
            shape = shape_at(tensor.shape, profile)
            block = self._blocks.get(f"{spec.name} {tensor.name}")
            found[tensor.name] = (
                self._inner[tensor.name]._replace(shape=shape)
                if block is None
                else block.tensor(tensor.name, shape)
            )
        return found

    def send(self, device: Device, spec: GraphSpec, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Enqueue the copies of a graph's inputs to the device."""
        for name, array in arrays.items():
            block = self._blocks[f"{spec.name} {name}"]
            block.host(name, array.shape)[...] = array
            block.upload_field(device, name, array.shape)

    def fetch(self, device: Device, spec: GraphSpec, profile: Profile) -> NDArray[np.int32] | None:
        """Enqueue the copy of what a graph kept, if it drops anything, and return where it will be."""
        for tensor in spec.outputs:
            if tensor.name in _KEPT:
                shape, block = shape_at(tensor.shape, profile), self._blocks[f"{spec.name} {tensor.name}"]
                kept = block.host(tensor.name, shape)
                device.download(kept, block.tensor(tensor.name, shape))
                return kept
        return None


@final
class Vision:
    """Runs the vision graph and, where a bundle has them, the text tower of CLIP and the reduce graph."""

    def __init__(self, manifest: Manifest, graphs: LoadedGraphs) -> None:
        """Allocate all buffers.

        Args:
            manifest: The bundle's.
            graphs: The graphs before the decoder, loaded.

        Raises:
            BackendError: If the device has not enough memory.
        """
        self._device, self._engines = graphs.device, graphs.engines
        self._buffers = VisionBuffers(manifest, graphs.device)
        self._timeline = Timeline(graphs.device)
        self._launches: dict[tuple[str, str], Any] = {}
        self._kept: dict[str, NDArray[np.int32]] = {}

    @property
    def graph_ms(self) -> dict[str, float]:
        """Milliseconds that the device spent in each graph for the last picture."""
        return self._timeline.milliseconds()

    def look(self, inputs: Mapping[str, NDArray[Any]], profile: Profile) -> DeviceTensor:
        """Enqueue the vision graph and return where its visual tokens [N, D] will be.

        Args:
            inputs: The graph's, padded to ``profile``.
            profile: One of its profiles.

        Raises:
            ShapeError: If an input is missing, unknown or of another shape or dtype.
        """
        self._timeline.clear()
        self._kept = {}
        return self._run(self._buffers.graphs["vision"], profile, inputs)["visual_tokens"]

    def read(self, clip_ids: NDArray[np.int32]) -> None:
        """Enqueue CLIP's text tower for texts [M, L]; the reduce graph finds them on the device."""
        spec = self._buffers.graphs["clip_text"]
        self._run(spec, find_profile(spec, {"M": len(clip_ids)}), {"clip_ids": clip_ids})

    def reduce(self, inputs: Mapping[str, NDArray[Any]], *, sizes: Mapping[str, int]) -> DeviceTensor:
        """Enqueue the reduce graph behind the vision graph and return where its tokens [K, D] will be.

        Args:
            inputs: What no other graph gives it.
            sizes: N, and T or M if it looks at the text.
        """
        spec = self._buffers.graphs["reduce"]
        wanted = {name: sizes[name] for name in spec.profiles[0].sizes}
        return self._run(spec, find_profile(spec, wanted), inputs)["reduced_tokens"]

    def kept_by(self, role: Literal["vision", "reduce"]) -> NDArray[np.int32] | None:
        """Return what a graph kept for the last picture, once the device has been waited for; None if it keeps all."""
        return self._kept.get(role)

    def _run(
        self, spec: GraphSpec, profile: Profile, inputs: Mapping[str, NDArray[Any]]
    ) -> dict[str, DeviceTensor]:
        tensors = self._buffers.tensors(spec, profile)
        for name, array in inputs.items():
            if (
                name not in tensors
                or array.shape != tensors[name].shape
                or array.dtype != tensors[name].dtype
            ):
                expected = tensors.get(name)
                raise ShapeError(
                    f"{spec.name} input {name!r}: expected {expected and expected.dtype}"
                    f" {expected and list(expected.shape)}, got {array.dtype} {list(array.shape)}"
                )
        self._buffers.send(self._device, spec, inputs)
        key = (spec.name, profile.name)
        if key not in self._launches:
            self._launches[key] = self._engines[spec.name].prepare(profile, tensors)
        self._timeline.enqueue(spec.name, self._launches[key])
        kept = self._buffers.fetch(self._device, spec, profile)
        if kept is not None:
            self._kept[spec.role] = kept
        return tensors
