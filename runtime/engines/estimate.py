"""Estimates the memory and time for building an engine, and its size.

W are the graph's weights in bytes:

    engine   W + profiles * architectures * 3 MB of kernels
    peak     W                 the weight files, which the parser maps: the system can take these pages back
           + W                 TensorRT's copy, from which the engine is written piece by piece
           + W                 the serialized engine, in releases that cannot do so, such as 10.3
           + W                 with ``tensorrt``: the copy on the GPU for timing tactics; a Jetson's GPU shares the memory
           + min(W, 0.6 GB)    the optimizer's working memory
           + 0.4 GB            Python and TensorRT's libraries
    time     3 s + 15 s per GB of weights

Fitted to tensorrt-rtx 1.7 on the graphs of LLaVA-NeXT-7B, with and without writing in pieces; docs/build.md has the
measurements. On two CPUs, times were between half and twice the estimate. Memory and time of ``tensorrt`` are not
measured: it times tactics on the GPU, which tensorrt-rtx leaves to the first run.
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
    """Memory and disk space for building one graph's engine."""

    engine_bytes: int
    """Size of the engine file."""
    mapped_bytes: int
    """Part of the peak in mapped weight files, whose pages the system can take back."""
    peak_bytes: int
    """Resident memory of the process that builds it."""


def estimate_memory(
    spec: GraphSpec, *, backend: EngineBackend, streams_engines: bool, num_architectures: int
) -> BuildMemory:
    """Return the estimate for building the engine of ``spec`` for ``num_architectures`` compute capabilities.

    ``streams_engines`` is ``TensorRT.streams_engines``.
    """
    weights = spec.weight_bytes
    copies = 2 + (backend == "tensorrt") + (not streams_engines)
    return BuildMemory(
        engine_bytes=weights + len(spec.profiles) * num_architectures * _KERNELS_BYTES,
        mapped_bytes=weights,
        peak_bytes=copies * weights + min(weights, _WORK_BYTES) + _BASE_BYTES,
    )


def estimate_seconds(spec: GraphSpec) -> float:
    """Return the estimated seconds for building the engine of ``spec`` for one compute capability."""
    return _BASE_SECONDS + _SECONDS_PER_BYTE * spec.weight_bytes
