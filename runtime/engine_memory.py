"""How much memory building an engine takes, and how large it becomes, before any work.

W are the graph's weights, in bytes:

    engine   W + profiles * architectures * 3 MB of kernels
    peak     W        the weight files, which the parser maps: the system can take these pages back
           + 2 * W    TensorRT's own copy and the serialized engine
           + W        with ``tensorrt`` only: the copy on the GPU on which tactics are timed (a Jetson's memory is the same)
           + 0.4 GB   Python, TensorRT's libraries, the optimizer

Checked with tensorrt-rtx 1.7 on the graphs of LLaVA-NeXT-7B (docs/build.md); the line for ``tensorrt`` is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.engine_package import EngineBackend
    from trio_edge.runtime.manifest import GraphSpec

_KERNELS_BYTES = 3_000_000
_BASE_BYTES = 400_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMemory:
    """What building one graph's engine takes, in bytes."""

    engine_bytes: int
    """Size of the file."""
    mapped_bytes: int
    """Part of the peak that the system can take back: the mapped weights."""
    peak_bytes: int
    """Resident memory of the process that builds it."""


def estimate_memory(spec: GraphSpec, *, backend: EngineBackend, num_architectures: int) -> BuildMemory:
    """Return what building the engine of ``spec`` is expected to take.

    Args:
        spec: The graph.
        backend: "tensorrt" keeps the weights on the GPU while it builds.
        num_architectures: Compute capabilities that the engine is for.
    """
    weights = spec.weight_bytes
    on_gpu = weights if backend == "tensorrt" else 0
    return BuildMemory(
        engine_bytes=weights + len(spec.profiles) * num_architectures * _KERNELS_BYTES,
        mapped_bytes=weights,
        peak_bytes=3 * weights + on_gpu + _BASE_BYTES,
    )
