"""Estimates of the memory and time that building an engine takes, and of its size.

W are the graph's weights, in bytes:

    engine   W + profiles * architectures * 3 MB of kernels
    peak     W                 the weight files, which the parser maps: the system can take these pages back
           + W                 TensorRT's copy, out of which the engine is written piece by piece
           + W                 where the release cannot do so, as 10.3: the serialized engine
           + W                 with ``tensorrt``: the copy on the GPU on which tactics are timed; on a Jetson it is the same memory
           + min(W, 0.6 GB)    what the optimizer works on
           + 0.4 GB            Python and TensorRT's libraries
    time     3 s + 15 s per GB of weights

Fitted to tensorrt-rtx 1.7 on the graphs of LLaVA-NeXT-7B, with and without writing in pieces: docs/build.md compares it with
measurements; times were between half and twice the estimate, on two CPUs. The line for ``tensorrt`` is not measured,
nor is its time: it tries tactics on the GPU, which tensorrt-rtx leaves to the first run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.engines.package import EngineBackend

_KERNELS_BYTES = 3_000_000
_BASE_BYTES = 400_000_000
_WORK_BYTES = 600_000_000
_BASE_SECONDS, _SECONDS_PER_BYTE = 3.0, 15e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildMemory:
    """Memory and disk that building one graph's engine takes, in bytes."""

    engine_bytes: int
    """Size of the file."""
    mapped_bytes: int
    """Part of the peak that the system can take back: the mapped weights."""
    peak_bytes: int
    """Resident memory of the process that builds it."""


def estimate_memory(
    spec: GraphSpec, *, backend: EngineBackend, streams_engines: bool, num_architectures: int
) -> BuildMemory:
    """Return what building the engine of ``spec`` is expected to take.

    Args:
        spec: The graph.
        backend: "tensorrt" keeps the weights on the GPU while it builds.
        streams_engines: As ``TensorRT.streams_engines``.
        num_architectures: Compute capabilities that the engine is for.
    """
    weights = spec.weight_bytes
    copies = 2 + (backend == "tensorrt") + (not streams_engines)
    return BuildMemory(
        engine_bytes=weights + len(spec.profiles) * num_architectures * _KERNELS_BYTES,
        mapped_bytes=weights,
        peak_bytes=copies * weights + min(weights, _WORK_BYTES) + _BASE_BYTES,
    )


def estimate_seconds(spec: GraphSpec) -> float:
    """Return about how long building the engine of ``spec`` takes, for one compute capability."""
    return _BASE_SECONDS + _SECONDS_PER_BYTE * spec.weight_bytes
