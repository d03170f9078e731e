"""Keeps the vision graph's outputs for recent images, so that a further question about one of them skips the graph."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, final

from trio_edge.runtime.buffers.blocks import allocate_tensor, copy_tensor
from trio_edge.runtime.devices.interface import largest_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.devices.interface import Allocator, Device, DeviceTensor


@final
class SeenImages:
    """The ``count`` most recently used images, by their pixels; a new one replaces the least recently used one."""

    def __init__(self, spec: GraphSpec, allocator: Allocator, *, count: int) -> None:
        """Allocate memory for the outputs of ``spec``, the vision graph, of ``count`` images."""
        self._free = [
            {
                tensor.name: allocate_tensor(
                    allocator, tensor, largest_shape(spec, tensor), graph=f"{spec.name}, kept"
                )
                for tensor in spec.outputs
            }
            for _ in range(count)
        ]
        self._count = count
        self._seen: OrderedDict[bytes, dict[str, DeviceTensor]] = OrderedDict()
        """The graph's outputs by key and name, with room for the largest profile."""

    def key_of(self, image: Image.Image, processing: object) -> bytes:
        """Return a digest of pixels and processing; empty if no images are kept."""
        if self._count == 0:
            return b""
        digest = hashlib.blake2b(repr((image.size, image.mode, processing)).encode(), digest_size=32)
        digest.update(image.tobytes())
        return digest.digest()

    def bring_back(self, key: bytes, device: Device, outputs: Mapping[str, DeviceTensor]) -> bool:
        """Enqueue copies of a kept image's outputs to ``outputs``; return False if the image is not kept."""
        if key not in self._seen:
            return False
        self._seen.move_to_end(key)
        for name, target in outputs.items():
            copy_tensor(device, target, self._seen[key][name])
        return True

    def keep(self, key: bytes, device: Device, outputs: Mapping[str, DeviceTensor]) -> None:
        """Enqueue copies of ``outputs``, the graph's for an image; an image without a key is not kept."""
        if not key:
            return
        slot = self._free.pop() if self._free else self._seen.popitem(last=False)[1]
        for name, source in outputs.items():
            copy_tensor(device, slot[name], source)
        self._seen[key] = slot
