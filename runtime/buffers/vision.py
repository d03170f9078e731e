"""The device memory of the graphs before the decoder, except the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.buffers.blocks import Block, allocate_largest, allocate_tensor
from trio_edge.runtime.bundle.graph_io import KEPT_PATCHES, KEPT_TOKENS, VISUAL_TOKENS
from trio_edge.runtime.devices.interface import largest_shape, shape_at

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest, Profile, TensorSpec
    from trio_edge.runtime.devices.interface import Allocator, Device, DeviceTensor

_ROLES = ("vision", "clip_text", "reduce")
_KEPT = (KEPT_PATCHES, KEPT_TOKENS)


@final
class VisionBuffers:
    """Inputs and outputs of the graphs before the decoder, at addresses that never change."""

    def __init__(self, manifest: Manifest, allocator: Allocator) -> None:
        """Allocate all buffers for the largest profiles."""
        self.graphs = {spec.role: spec for spec in manifest.graphs if spec.role in _ROLES}
        self._blocks: dict[tuple[str, str], Block] = {}
        """Tensors that the host reads or writes, by graph and name."""
        self._inner: dict[str, DeviceTensor] = {}
        """Outputs that stay on the device, by name; later graphs read them as their inputs of the same name."""
        for spec in self.graphs.values():
            for tensor in spec.tensors:
                self._allocate(allocator, spec, tensor)
        self._manifest = manifest
        self._several: list[DeviceTensor] = []
        if manifest.max_images > 1:
            self.several(allocator)

    def several(self, allocator: Allocator) -> list[DeviceTensor]:
        """Return the memory for the tokens and planes of several images in a row: [largest N, D] each.

        A bundle for one image allocates it at its first prompt with several small images.
        """
        manifest = self._manifest
        tokens = self.graphs["vision"].tensor(VISUAL_TOKENS)
        shape = manifest.max_visual, manifest.dimensions.hidden_size
        while len(self._several) <= manifest.num_deepstack:
            self._several.append(allocate_tensor(allocator, tokens, shape, graph="several images"))
        return self._several

    def _allocate(self, allocator: Allocator, spec: GraphSpec, tensor: TensorSpec) -> None:
        shape = largest_shape(spec, tensor)
        if tensor in spec.outputs and tensor.name not in _KEPT:
            self._inner[tensor.name] = allocate_largest(allocator, spec, tensor)
        elif tensor.name not in self._inner:
            fields = {tensor.name: (tensor.dtype, shape)}
            purpose = f"{tensor.name} of {spec.name}"
            self._blocks[spec.name, tensor.name] = Block(allocator, fields, purpose=purpose)

    def tensors(self, spec: GraphSpec, profile: Profile) -> dict[str, DeviceTensor]:
        """Return the tensors of a graph at a profile."""
        found = {}
        for tensor in spec.tensors:
            block, name = self._blocks.get((spec.name, tensor.name)), tensor.name
            whole = self._inner[name] if block is None else block.tensor(name)
            found[name] = whole._replace(shape=shape_at(tensor.shape, profile))
        return found

    def send(self, device: Device, spec: GraphSpec, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Enqueue the copies of a graph's inputs to the device."""
        for name, array in arrays.items():
            block = self._blocks[spec.name, name]
            block.host(name, array.shape)[...] = array
            block.upload_field(device, name, array.shape)

    def fetch(self, device: Device, spec: GraphSpec, profile: Profile) -> NDArray[np.int32] | None:
        """Enqueue a copy of the indices that a graph kept and return their array on the host; None if it drops nothing."""
        for tensor in spec.outputs:
            if tensor.name in _KEPT:
                shape, block = shape_at(tensor.shape, profile), self._blocks[spec.name, tensor.name]
                kept = block.host(tensor.name, shape)
                device.download(kept, block.tensor(tensor.name, shape))
                return kept
        return None
