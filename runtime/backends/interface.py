"""The interface of a backend, and the checks that all backends share.

A backend loads a bundle's graphs onto a device; ``trio_edge.runtime.devices.interface`` describes the result. Before it
loads anything, it compares the device memory that they need with the free memory:

weights      of all loaded graphs; with TensorRT, the sizes of the engine files
KV caches    at full capacity
buffers      inputs, results and tensors between the graphs: the sum of ``memory_plan``
workspace    the largest activations of a layer range: 3 S D b + max(S (H + 2 G) E b, 3 S I b), with b bytes per element
             and fused attention. TensorRT reports the real number once its engines are loaded
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.machine import whole_memory_bytes
from trio_edge.runtime.devices.memory import memory_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import Device, LoadedGraphs

OnnxRuntimeName = Literal["onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime"]


class Backend(Protocol):
    """Loads graphs onto a device."""

    @property
    def name(self) -> str:
        """Name for messages and statistics."""

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load the graphs called ``names`` onto a device of their own; None means all graphs.

        Raises:
            BackendError: If a graph cannot be loaded or differs from the manifest, or the device has too little memory.
        """


def selected_graphs(bundle: Bundle, names: Sequence[str] | None) -> list[GraphSpec]:
    """Return the manifest entries of the graphs called ``names``, in the manifest's order; None means all.

    Raises:
        BackendError: If the bundle has no such graph.
    """
    graphs = bundle.manifest.graphs
    known = [spec.name for spec in graphs]
    if unknown := [name for name in names or () if name not in known]:
        raise BackendError(
            f"{bundle.folder}: expected one of the graphs {', '.join(known)}, got {unknown[0]!r}; choose one of them"
        )
    return [spec for spec in graphs if names is None or spec.name in names]


def estimate(manifest: Manifest, specs: Sequence[GraphSpec], *, weight_bytes: int) -> dict[str, int]:
    """Return the bytes by purpose for loading ``specs``; buffers and KV caches only if these are all graphs."""
    dims, size = manifest.dimensions, np.dtype(manifest.dtype).itemsize
    rows = max((profile.sizes.get("S", 0) for spec in specs for profile in spec.profiles), default=0)
    attention = (dims.num_heads + 2 * dims.num_kv_heads) * dims.head_size
    activations = rows * size * (3 * dims.hidden_size + max(attention, 3 * dims.intermediate_size))
    memory = {"weights": weight_bytes, "workspace": activations}
    # Single graphs are loaded for comparisons and bring their own buffers.
    if len(specs) == len(manifest.graphs):
        buffers = memory_plan(manifest).num_bytes - manifest.kv_bytes
        memory |= {"KV caches": manifest.kv_bytes, "buffers": buffers}
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
