"""What the machine reaches on the spot: a large product through the backend that runs the bundle, and a copy of memory.

They are measured, not looked up, so a power mode, a governor or another program lowers them as it lowers the bundle.
"""

from __future__ import annotations

import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trio_edge.profiling.measure.matmul_graph import INPUT, random_matrix
from trio_edge.profiling.measure.product_bundle import PRODUCT_GRAPH, PRODUCT_PROFILE, write_product_bundle
from trio_edge.profiling.report.profile import Ceilings
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
_SECONDS = 0.4
_SIZES = {True: 1024, False: 4096}
"""Of the product's matrices, on a CPU and on a GPU."""
_COPY_BYTES = 256 << 20


def measure_ceilings(backend: Backend, manifest: Manifest, *, cores: int) -> Ceilings:
    """Return what ``backend`` reaches with products in the type of ``manifest``, and what copies of memory reach.

    Args:
        backend: Runs the product.
        manifest: Of a bundle; decides type and opset.
        cores: Threads that copy at once on a CPU.

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
            product.run({INPUT: random_matrix(rows=size, columns=size, dtype=manifest.dtype)})
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
    """Return the least of what ``milliseconds`` gives until the time is up, but for the first."""
    milliseconds()
    least, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        least = min(least, milliseconds())
    return least
