"""The machine's peak rates, measured with a large matrix product through the bundle's backend, and with a copy of memory.

Because they are measured, a power mode, a governor or another program lowers them as it lowers the bundle's rates.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from trio_edge.runtime.backends.single_graph import SingleGraph
from trio_edge.runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphSpec,
    Manifest,
    Profile,
    TensorSpec,
    json_from_manifest,
)
from trio_edge.runtime.bundle.reader import Bundle
from trio_edge.runtime.devices.interface import Device, PitchedRows
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build
from trio_edge.runtime.engines.package import ENGINE_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trio_edge.runtime.backends.interface import Backend


_HOST_BACKEND = "onnxruntime"
_SECONDS = 0.4  # several products on a slow CPU, and too short to heat a module
_SIZES = {True: 1024, False: 4096}
"""Rows and columns of the matrices on a CPU (True) and on a GPU: large enough to hide the launch."""
_COPY_BYTES = 256 << 20  # more than any processor's caches


class Ceilings(msgspec.Struct, frozen=True, kw_only=True):
    """Measured peak rates of the machine."""

    flops_per_s: float
    matmul: str
    bytes_per_s: float
    """Read and written."""
    copy: str


def measure_ceilings(backend: Backend, manifest: Manifest, *, cores: int) -> Ceilings:
    """Return the rates of products through ``backend``, in the dtype of ``manifest``, and of copies of memory.

    On a CPU ``cores`` threads copy in parallel.

    Raises:
        BackendError: If the backend cannot run the product.
    """
    on_host = backend.name == _HOST_BACKEND
    size = _SIZES[on_host]
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_product_bundle(Path(folder), manifest, size=size)
        if backend.name in ENGINE_BACKENDS:
            build_engines(plan_build(bundle, BuildOptions(backend=backend.name, graphs=(PRODUCT_GRAPH,))))
        graphs = backend.load(bundle, [PRODUCT_GRAPH])
        try:
            product = SingleGraph(graphs, PRODUCT_GRAPH, profile=PRODUCT_PROFILE)
            product.run({_INPUT: _random(manifest, size=size)})
            milliseconds = _least(lambda: product.milliseconds(1))
            copy_ms = _copy_with_threads(cores) if on_host else _copy_on_device(graphs.device)
        finally:
            graphs.close()
    return Ceilings(
        flops_per_s=2e3 * size**3 / milliseconds,
        matmul=f"{manifest.dtype} [{size}, {size}] x [{size}, {size}] through {backend.name}",
        bytes_per_s=1e3 * 2 * _COPY_BYTES / copy_ms,  # read and written
        copy=f"{_COPY_BYTES >> 20} MB, read and written"
        + (f" by {cores} thread{'s' * (cores > 1)}" if on_host else " on the GPU"),
    )


def _copy_on_device(device: Device) -> float:
    """Return the least milliseconds of one copy on the GPU."""
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

    return _least(milliseconds)


def _copy_with_threads(cores: int) -> float:
    """Return the least milliseconds of one copy in the host's memory."""
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores)))
    with ThreadPoolExecutor(cores) as threads:

        def milliseconds() -> float:
            start = time.perf_counter()
            list(threads.map(lambda pair: np.copyto(*pair), parts))
            return 1e3 * (time.perf_counter() - start)

        return _least(milliseconds)


def _least(milliseconds: Callable[[], float]) -> float:
    """Return the least value of ``milliseconds()`` within the time limit."""
    milliseconds()  # the first call allocates, and raises the clocks
    # the least, not the median, because other programs can only make it slower
    least, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        least = min(least, milliseconds())
    return least


PRODUCT_GRAPH, PRODUCT_PROFILE = "head", "matmul"
_FILE, _WEIGHTS_FILE = "matmul.onnx", "weights.bin"
_INPUT = "rows"
_ELEMENT_TYPES = {"float32": 1, "float16": 10}
_SEED = 0
# product [S, S] = rows [S, S] x weights, of opset 18, as onnx serializes it; %c are rows and columns of the weights, in two bytes
# each, and the element type. These are bytes because a device need not have onnx; a test compares them with onnx's own. The
# weights are constants in a file, as in a bundle, so that backends can choose their layout.
_MODEL = (
    b'\x08\x08\x12\x00:\x8f\x01\n \n\x04rows\n\x07weights\x12\x07product"\x06MatMul\x12\x06matmul'
    b"*,\x08%c%c\x08%c%c\x10%cB\x07weightsj\x17\n\x08location\x12\x0bweights.binp\x01"
    b"Z\x18\n\x04rows\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01S"
    b"b\x1b\n\x07product\x12\x10\n\x0e\x08%c\x12\n\n\x03\x12\x01S\n\x03\x12\x01SB\x04\n\x00\x10\x12"
)


def product_model(dtype: str, *, size: int) -> bytes:
    """Return the ONNX model of the product, whose weights [size, size] are in ``weights.bin`` next to it.

    ``size`` is below 16384: two bytes have 14 bits of a number.
    """
    rows = (size & 0x7F | 0x80, size >> 7)
    return _MODEL % (*rows, *rows, *(_ELEMENT_TYPES[dtype],) * 3)


def write_product_bundle(folder: Path, manifest: Manifest, *, size: int) -> Bundle:
    """Write a bundle with the product [size, size] x [size, size] into ``folder`` and return it.

    It stands for the head of ``manifest``, another bundle's, in the dtype of that. Every backend can load it, and trio-build can
    build it.
    """
    contents = {
        _FILE: product_model(manifest.dtype, size=size),
        _WEIGHTS_FILE: _random(manifest, size=size).tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    entries = [
        FileEntry(path=name, num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    ]
    rows, product = (
        TensorSpec(name=name, dtype=manifest.dtype, shape=("S", "S")) for name in (_INPUT, "product")
    )
    graph = GraphSpec(
        name=PRODUCT_GRAPH,
        role="head",
        file=_FILE,
        inputs=(rows,),
        outputs=(product,),
        profiles=(Profile(name=PRODUCT_PROFILE, sizes={"S": size}),),
        weight_bytes=len(contents[_WEIGHTS_FILE]),
    )
    # the other graphs are not loaded; they stay because a manifest must have them
    graphs = tuple(graph if spec.name == graph.name else spec for spec in manifest.graphs)
    changed = msgspec.structs.replace(manifest, graphs=graphs, files=(*manifest.files, *entries))
    (folder / MANIFEST_NAME).write_bytes(json_from_manifest(changed))
    return Bundle(folder=folder, manifest=changed)


def _random(manifest: Manifest, *, size: int) -> NDArray[Any]:
    """Return normal random numbers [size, size], the same ones each time."""
    # a GPU needs less power for equal numbers than for random ones, and so has a higher clock
    values = np.random.default_rng(_SEED).standard_normal((size, size), np.float32)
    return values.astype(manifest.dtype)
