"""The device memory that a bundle takes, counted before anything is loaded and compared with what is free.

weights      of all loaded graphs; for TensorRT the sizes of the engine files, which hold them
KV caches    at their full capacity
buffers      inputs, results and what lies between the graphs: counted by laying out the real ones without memory
workspace    the largest activations of a layer range: 3 S D b + max(S (H + 2 G) E b, 3 S I b), with b bytes an element;
             attention is taken to be fused. TensorRT says the real number once its engines are loaded
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.buffers.decoder import DecoderBuffers
from trio_edge.runtime.buffers.vision import VisionBuffers
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.interface import aligned
from trio_edge.runtime.devices.machine import whole_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest
    from trio_edge.runtime.devices.interface import Device


def estimate(manifest: Manifest, specs: Sequence[GraphSpec], *, weight_bytes: int) -> dict[str, int]:
    """Return bytes by what they are for.

    Args:
        manifest: The bundle's.
        specs: The graphs to be loaded; buffers and KV caches are counted only if these are all.
        weight_bytes: Of these graphs.
    """
    memory = {"weights": weight_bytes, "workspace": _activation_bytes(manifest, specs)}
    # Single graphs are loaded for comparisons, with buffers of their own.
    if len(specs) == len(manifest.graphs):
        counting = _CountingAllocator()
        DecoderBuffers(manifest, counting)
        VisionBuffers(manifest, counting)
        memory |= {"KV caches": manifest.kv_bytes, "buffers": counting.num_bytes - manifest.kv_bytes}
    return memory


def check_memory(device: Device, memory: Mapping[str, int]) -> None:
    """Raise BackendError if ``device`` says that it has less free than ``memory``, or the machine has less in all."""
    # Without this, the system may end the whole process instead, as on a Jetson, whose GPU shares its memory.
    free, what = device.free_bytes(), "free"
    if free is None:  # the CPU: weights are mapped files, which the system can take back
        memory = {name: count for name, count in memory.items() if name != "weights"}
        free, what = whole_memory_bytes(), "in all"
    needed = sum(memory.values())
    if free is not None and needed > free:
        parts = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in memory.items())
        raise BackendError(
            f"{device.name} memory: expected {needed / 1e9:.2f} GB {what} ({parts}), got {free / 1e9:.2f} GB; close other"
            " programs, or export with fewer --image-size, --max-text or --max-new-tokens"
        )


def _activation_bytes(manifest: Manifest, specs: Sequence[GraphSpec]) -> int:
    dims, size = manifest.dimensions, np.dtype(manifest.dtype).itemsize
    rows = max((profile.sizes.get("S", 0) for spec in specs for profile in spec.profiles), default=0)
    attention = (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_size
    return rows * size * (3 * dims.hidden_size + max(attention, 3 * dims.intermediate_size))


@final
class _CountingAllocator:
    """Adds up what would be allocated on the device."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        self.num_bytes += aligned(num_bytes)
        return 0

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        if num_bytes > (whole_memory_bytes() or num_bytes):
            raise BackendError(
                f"memory: expected {num_bytes / 1e9:.2f} GB for {purpose}, the machine has less; export the bundle again"
            )
        return np.empty(num_bytes, np.uint8)  # the system gives pages only when they are written
