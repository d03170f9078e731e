"""The device memory that a bundle needs, counted before anything is loaded and compared with the free memory.

weights      of all loaded graphs; with TensorRT, the sizes of the engine files
KV caches    at full capacity
buffers      inputs, results and tensors between the graphs: the sum of ``Memory``
workspace    the largest activations of a layer range: 3 S D b + max(S (H + 2 G) E b, 3 S I b), with b bytes per element
             and fused attention. TensorRT reports the real number once its engines are loaded
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.buffers.memory import Memory
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.interface import aligned
from trio_edge.runtime.devices.machine import whole_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest
    from trio_edge.runtime.devices.interface import Device


def estimate(manifest: Manifest, specs: Sequence[GraphSpec], *, weight_bytes: int) -> dict[str, int]:
    """Return the bytes by purpose for loading ``specs``; buffers and KV caches only if these are all graphs."""
    memory = {"weights": weight_bytes, "workspace": _activation_bytes(manifest, specs)}
    # Single graphs are loaded for comparisons and bring their own buffers.
    if len(specs) == len(manifest.graphs):
        counting = _CountingAllocator()
        Memory(manifest, counting)
        memory |= {"KV caches": manifest.kv_bytes, "buffers": counting.num_bytes - manifest.kv_bytes}
    return memory


def check_memory(device: Device, memory: Mapping[str, int]) -> None:
    """Raise BackendError if ``memory`` exceeds the free memory of ``device``, or on the CPU the machine's whole memory."""
    # Otherwise the system may kill the process, as on a Jetson, whose GPU shares the host's memory.
    free, what = device.free_bytes(), "free"
    if free is None:  # the CPU: weights are mapped files, whose pages the system can take back
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
    """Adds up device allocations without making them."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        self.num_bytes += aligned(num_bytes)
        return 0

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        if num_bytes > (whole_memory_bytes() or num_bytes):
            raise BackendError(
                f"memory: expected {num_bytes / 1e9:.2f} GB for {purpose}, got less in the whole machine; export the bundle"
                " with a smaller --max-text"
            )
        return np.empty(num_bytes, np.uint8)  # costs nothing: the system provides pages when they are written
