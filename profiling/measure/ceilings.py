"""The machine's ceilings, measured on the spot: a large product through the backend that runs the bundle, and a copy of memory.

They are measured, not looked up, so a power mode, a governor or another program lowers them as it lowers the bundle.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from trio_edge.profiling.measure.product import (
    PRODUCT_GRAPH,
    PRODUCT_PROFILE,
    product_inputs,
    write_product_bundle,
)
from trio_edge.runtime.backends.single_graph import SingleGraph
from trio_edge.runtime.devices.interface import PitchedRows
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build
from trio_edge.runtime.engines.package import ENGINE_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.backends.interface import Backend
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.devices.interface import Device

_HOST_BACKEND = "onnxruntime"
_SECONDS = 0.4  # several products on a slow CPU, and too short to heat a module
_SIZES = {True: 1024, False: 4096}
"""Rows and columns of the product's matrices, on a CPU and on a GPU: large enough to hide the launch."""
_COPY_BYTES = 256 << 20  # more than any processor's caches


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Rates that the machine reached on the spot, through the same backend."""

    flops_per_s: float
    matmul: str
    bytes_per_s: float
    """Read and written."""
    copy: str


def measure_ceilings(backend: Backend, manifest: Manifest, *, cores: int) -> Ceilings:
    """Return the rate of ``backend`` with products in the dtype of ``manifest``, and that of copies of memory.

    Args:
        backend: Runs the product.
        manifest: Manifest of a bundle; the product has its dtype.
        cores: Number of threads that copy at once on a CPU.

    Raises:
        BackendError: If the backend cannot run the product.
    """
    on_host = backend.name == _HOST_BACKEND
    size = _SIZES[on_host]
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_product_bundle(Path(folder), manifest, size=size)
        if backend.name in ENGINE_BACKENDS:
            build_engines(plan_build(bundle, BuildOptions(backend=backend.name)))
        graphs = backend.load(bundle, [PRODUCT_GRAPH])
        try:
            product = SingleGraph(graphs, PRODUCT_GRAPH, profile=PRODUCT_PROFILE)
            product.run(product_inputs(manifest, size=size))
            milliseconds = _least(lambda: product.milliseconds(1))
            moved, copy_ms = _copy(graphs.device, cores=cores, on_host=on_host)
        finally:
            graphs.close()
    return Ceilings(
        flops_per_s=2e3 * size**3 / milliseconds,
        matmul=f"{manifest.dtype} [{size}, {size}] x [{size}, {size}] through {backend.name}",
        bytes_per_s=1e3 * moved / copy_ms,
        copy=f"{moved // 2 >> 20} MB, read and written"
        + (f" by {cores} thread{'s' * (cores > 1)}" if on_host else " on the GPU"),
    )


def _copy(device: Device, *, cores: int, on_host: bool) -> tuple[int, float]:
    """Return bytes read and written by one copy, and its milliseconds."""
    if on_host:
        return 2 * _COPY_BYTES, _copy_with_threads(cores)
    source, target = (
        PitchedRows(device.allocate(_COPY_BYTES, purpose="measuring"), _COPY_BYTES) for _ in range(2)
    )
    start, end = device.event(), device.event()

    def milliseconds() -> float:
        start.record()
        device.copy_rows(target, source, row_bytes=_COPY_BYTES, num_rows=1)
        end.record()
        end.wait()
        return end.milliseconds_since(start)

    return 2 * _COPY_BYTES, _least(milliseconds)


def _copy_with_threads(cores: int) -> float:
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores)))
    with ThreadPoolExecutor(cores) as threads:

        def milliseconds() -> float:
            start = time.perf_counter()
            list(threads.map(lambda pair: np.copyto(*pair), parts))
            return 1e3 * (time.perf_counter() - start)

        return _least(milliseconds)


def _least(milliseconds: Callable[[], float]) -> float:
    """Return the least that ``milliseconds`` gives until the time is up."""
    milliseconds()  # the first call allocates, and wakes the clocks up
    # The least, not the median: other programs make a product slower and never faster.
    least, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        least = min(least, milliseconds())
    return least
