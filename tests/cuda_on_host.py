"""The CUDA runtime and TensorRT as far as the runtime calls them, on the CPU and with real numbers.

``CudaOnHost`` has the functions of ``cuda.bindings.runtime`` with their signatures. Its stream is lazy: what is enqueued happens
when the host waits, so that a result read too early, or an input overwritten too early, is wrong here. Copies are checked against
what is allocated. ``TensorRTOnHost`` has the classes of ``tensorrt``; an engine is the path of the ONNX graph, which ONNX
Runtime runs on the bound addresses. Both write down every call.
"""

# ruff: noqa: N802, N815  (the names are CUDA's)

from __future__ import annotations

import json
import time
import weakref
from enum import Enum, auto
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from tests.reference.plain_decoder import plain_session
from trio_edge.runtime.backends import tensorrt as backend_tensorrt
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, shape_at
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.devices import cuda as device_cuda
from trio_edge.runtime.devices import machine
from trio_edge.runtime.devices.host import array_at
from trio_edge.runtime.engines.cpu import onnxruntime_version
from trio_edge.runtime.engines.files import ENGINES_SCHEMA_VERSION, EngineEntry, EngineSet
from trio_edge.runtime.engines.package import TensorRT

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from trio_edge.runtime.engines.package import EngineBackend

STREAM = 0x5EED
WORKSPACE_BYTES = 4096
VERSION = "10.3.0"


class Error(Enum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInvalidValue = 1
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureUnsupported = 900


class Event:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.pending = 0


class CudaOnHost:
    """``cuda.bindings.runtime`` with one GPU whose memory is the host's."""

    cudaError_t = Error
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice="to device",
        cudaMemcpyDeviceToHost="to host",
        cudaMemcpyDeviceToDevice="within",
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaStreamNonBlocking = 1

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        self.memory_bytes = memory_bytes
        self.device: dict[int, NDArray[np.uint8]] = {}
        self.pinned: dict[int, NDArray[np.uint8]] = {}
        self.calls: list[tuple[Any, ...]] = []
        """Every call: the function's name and its arguments; launches as ("enqueue", graph, profile, tensors)."""
        self.open_handles = 0
        self.uncapturable = ""
        """A graph whose engine refuses to run while it is captured."""
        self.last_error = Error.cudaSuccess
        """Errors of failed captures that ``cudaGetLastError`` has not returned yet."""
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        """Those that are loaded."""
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        """Likewise."""
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None

    def enqueue(self, work: Callable[[], None]) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    @property
    def is_capturing(self) -> bool:
        return self._captured is not None

    def _run(self) -> None:
        assert self._captured is None, "the host waits while it captures"
        while self._queue:
            self._queue.pop(0)()

    def _inside(self, address: int, size: int, places: dict[int, NDArray[np.uint8]]) -> bool:
        return any(
            start <= address and address + size <= start + len(memory) for start, memory in places.items()
        )

    # memory

    def cudaSetDevice(self, device: int) -> tuple[Error]:
        return (Error.cudaSuccess,)

    def cudaMalloc(self, size: int) -> tuple[Error, int]:
        self.calls.append(("cudaMalloc", size))
        if size + self.used_bytes > self.memory_bytes:
            return Error.cudaErrorMemoryAllocation, 0
        return Error.cudaSuccess, self._new(size, self.device)

    def cudaMallocHost(self, size: int) -> tuple[Error, int]:
        return Error.cudaSuccess, self._new(size, self.pinned)

    def _new(self, size: int, places: dict[int, NDArray[np.uint8]]) -> int:
        memory = np.full(size + 256, 0xFF, np.uint8)  # NaN, where nobody has written
        offset = -memory.ctypes.data % 256
        address = memory.ctypes.data + offset
        places[address] = memory[offset : offset + size]
        return address

    @property
    def used_bytes(self) -> int:
        return sum(map(len, self.device.values()))

    def cudaFree(self, devPtr: int) -> tuple[Error]:
        del self.device[devPtr]
        return (Error.cudaSuccess,)

    def cudaFreeHost(self, ptr: int) -> tuple[Error]:
        del self.pinned[ptr]
        return (Error.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        return Error.cudaSuccess, self.memory_bytes - self.used_bytes, self.memory_bytes

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Error]:
        assert stream == STREAM
        if not self._inside(devPtr, count, self.device):
            return (Error.cudaErrorInvalidValue,)
        self.enqueue(lambda: array_at(devPtr, shape=(count,)).fill(value))
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: str, stream: int) -> tuple[Error]:
        assert stream == STREAM
        self.calls.append(("cudaMemcpyAsync", dst, src, count, kind))
        on_device = dst if kind == "to device" else src
        if not self._inside(on_device, count, self.device):
            return (Error.cudaErrorInvalidValue,)

        def copy() -> None:
            array_at(dst, shape=(count,))[:] = array_at(src, shape=(count,))

        self.enqueue(copy)
        return (Error.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: str, stream: int
    ) -> tuple[Error]:
        assert stream == STREAM
        self.calls.append(("cudaMemcpy2DAsync", dst, dpitch, src, spitch, width, height))
        ends = ((dst, dpitch), (src, spitch))
        fits = all(self._inside(start, pitch * (height - 1) + width, self.device) for start, pitch in ends)
        if kind != "within" or width > min(dpitch, spitch) or not fits:
            return (Error.cudaErrorInvalidValue,)

        def copy() -> None:
            target = array_at(dst, shape=(height, width), strides=(dpitch, 1))
            target[...] = array_at(src, shape=(height, width), strides=(spitch, 1))

        self.enqueue(copy)
        return (Error.cudaSuccess,)

    # stream, events, graphs

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, int]:
        assert flags == self.cudaStreamNonBlocking
        self.open_handles += 1
        return Error.cudaSuccess, STREAM

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        self.open_handles -= 1
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        self.calls.append(("cudaStreamSynchronize",))
        self._run()
        return (Error.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Error, Event]:
        self.open_handles += 1
        return Error.cudaSuccess, Event()

    def cudaEventDestroy(self, event: Event) -> tuple[Error]:
        self.open_handles -= 1
        return (Error.cudaSuccess,)

    def cudaEventRecord(self, event: Event, stream: int) -> tuple[Error]:
        event.pending += 1

        def record() -> None:
            event.seconds = time.perf_counter()
            event.pending -= 1

        self.enqueue(record)
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: Event) -> tuple[Error]:
        self.calls.append(("cudaEventSynchronize",))
        assert self._captured is None, "the host waits while it captures"
        while event.pending:
            self._queue.pop(0)()
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Event, end: Event) -> tuple[Error, float]:
        if start.pending or end.pending:
            return Error.cudaErrorInvalidValue, 0.0
        return Error.cudaSuccess, 1e3 * (end.seconds - start.seconds)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Error]:
        self.calls.append(("cudaStreamBeginCapture",))
        self._captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        captured, self._captured = self._captured, None
        if self.last_error is not Error.cudaSuccess:  # something in between could not be captured
            return self.last_error, None
        self.open_handles += 1
        return Error.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        self.open_handles += 1
        return Error.cudaSuccess, tuple(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        self.open_handles -= 1
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Error]:
        assert self.contexts, "a captured sequence outlives the contexts that it runs"
        self.open_handles -= 1
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> tuple[Error]:
        self.calls.append(("cudaGraphLaunch", len(graphExec)))
        for work in graphExec:
            self.enqueue(work)
        return (Error.cudaSuccess,)

    # errors

    def cudaGetLastError(self) -> tuple[Error]:
        last, self.last_error = self.last_error, Error.cudaSuccess
        return (last,)

    def cudaGetErrorName(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, error.name.encode()

    def cudaGetErrorString(self, error: Error) -> tuple[Error, bytes]:
        return Error.cudaSuccess, b"what went wrong"


class Strategy(Enum):
    STATIC = auto()
    USER_MANAGED = auto()


class Specialization(Enum):
    LAZY = auto()
    EAGER = auto()


class RuntimeCache:
    """``tensorrt_rtx.IRuntimeCache``: holds the names of the engines whose contexts were made with it, and outlives these."""

    def __init__(self, cuda: CudaOnHost) -> None:
        self._cuda = cuda
        self._contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self._kernels: set[str] = set()

    def __del__(self) -> None:
        assert not self._contexts

    def deserialize(self, blob: bytes) -> bool:
        assert self._cuda.open_handles
        kernels = blob.decode().splitlines()
        if kernels[:1] != ["kernels"]:
            return False
        self._kernels |= {*kernels[1:]}
        return True

    def serialize(self) -> bytes:
        assert self._cuda.open_handles
        return "\n".join(["kernels", *sorted(self._kernels)]).encode()

    def _compile(self, name: str, context: Context) -> None:
        self._contexts.add(context)
        if name not in self._kernels:
            self._cuda.calls.append(("compile", name))
            self._kernels.add(name)


class RuntimeConfig:
    """``tensorrt_rtx.IRuntimeConfig``."""

    def __init__(self, cuda: CudaOnHost) -> None:
        self.strategy = Strategy.STATIC
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self._cuda = cuda
        self._cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._cuda)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self._cache = cache
        return True

    def _compile(self, name: str, context: Context) -> None:
        assert self._cache is not None
        self._cache._compile(name, context)
        self._cache = None  # as TensorRT's bindings: it is the caller's to keep

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy


class Context:
    """``tensorrt.IExecutionContext``: refuses to run before everything is set."""

    def __init__(self, engine: Engine, settings: Strategy | RuntimeConfig) -> None:
        self.engine = engine
        engine.cuda.contexts.add(self)
        self._settings = weakref.ref(settings)  # as TensorRT's bindings: they are the caller's to keep
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.workspace = (0, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self.engine.device_memory_size_v2
        self.workspace = (memory, size)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        self.engine.cuda.calls.append(("switch", self.engine.spec.name, profile_index))
        self.profile = profile_index
        self.shapes = {}  # TensorRT forgets them, too
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory % 256 == 0 and memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, spec, cuda = self.engine, self.engine.spec, self.engine.cuda
        assert self._settings() is not None and cuda.last_error is Error.cudaSuccess
        assert stream_handle == STREAM and self.workspace[0] and self.profile is not None
        if cuda.is_capturing and spec.name == cuda.uncapturable:
            cuda.last_error = Error.cudaErrorStreamCaptureUnsupported
            return False
        profile = spec.profiles[self.profile]
        tensors: dict[str, tuple[int, tuple[int, ...], str]] = {}
        for tensor in (*spec.inputs, *spec.outputs):
            shape = shape_at(tensor.shape, profile)
            assert self.shapes.get(tensor.name, shape) == shape
            tensors[tensor.name] = (self.addresses[tensor.name], shape, tensor.dtype)
        assert set(self.shapes) == set(spec.input_names)
        cuda.calls.append(("enqueue", spec.name, profile.name, tensors))
        cuda.enqueue(lambda: engine.compute(tensors))
        return True


class Engine:
    """``tensorrt.ICudaEngine`` of an ONNX graph."""

    device_memory_size_v2 = WORKSPACE_BYTES

    def __init__(self, description: dict[str, str], cuda: CudaOnHost) -> None:
        self.cuda = cuda
        folder = Path(description["bundle"])
        manifest = manifest_from_json((folder / MANIFEST_NAME).read_bytes(), where="here")
        specs = (spec for graph in manifest.graphs for spec in (graph, *graph.split()))
        self.spec = next(spec for spec in specs if spec.name == description["graph"])
        if self.spec.pieces and onnxruntime_version() < (1, 24):
            pytest.skip(
                "onnxruntime 1.23, the last one for Python 3.10, cannot run pieces without elements; runs on 3.11 and later"
            )
        self.session = plain_session(folder, self.spec)
        cuda.engines.add(self)

    def create_execution_context(self, strategy: Strategy | RuntimeConfig) -> Context:
        settings = strategy
        if isinstance(strategy, RuntimeConfig):
            assert strategy.dynamic_shapes_kernel_specialization_strategy is Specialization.EAGER
            strategy = strategy.strategy
        assert strategy is Strategy.USER_MANAGED
        context = Context(self, settings)
        if isinstance(settings, RuntimeConfig):
            settings._compile(self.spec.name, context)
        return context

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.cuda)

    def compute(self, tensors: dict[str, tuple[int, tuple[int, ...], str]]) -> None:
        arrays = {
            name: array_at(address, shape=(int(np.prod(shape)) * np.dtype(dtype).itemsize,))
            .view(dtype)
            .reshape(shape)
            for name, (address, shape, dtype) in tensors.items()
        }
        outputs = [tensor.name for tensor in self.spec.outputs]
        values = self.session.run(outputs, {name: arrays[name].copy() for name in self.spec.input_names})
        for name, value in zip(outputs, values):
            arrays[name][...] = value


class TensorRTOnHost:
    """The module ``tensorrt`` or ``tensorrt_rtx``, as far as engines are run with it."""

    ExecutionContextAllocationStrategy = Strategy

    class ILogger:
        ERROR = 1

    def __init__(self, cuda: CudaOnHost, *, backend: EngineBackend) -> None:
        first_logger: list[weakref.ref[Any]] = []
        if backend == "tensorrt-rtx":
            self.DynamicShapesKernelSpecializationStrategy = Specialization

        class Runtime:
            def __init__(self, logger: Any) -> None:
                first_logger.append(weakref.ref(logger))

            def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
                content = bytes(serialized_engine)
                if content.startswith(b"broken"):
                    logger = first_logger[0]()  # whatever was given later
                    assert logger is not None, "TensorRT's first logger is gone"
                    logger.log(1, "Serialization assertion failed.\nVersion tag does not match.")
                    return None
                return Engine(json.loads(content), cuda)

        self.Runtime = Runtime


def write_engines(
    bundle: Path, *, host: Any, backend: EngineBackend = "tensorrt", separate: bool = False
) -> Path:
    """Add to ``bundle`` the engines that ``TensorRTOnHost`` runs, and return their folder."""
    manifest = manifest_from_json((bundle / MANIFEST_NAME).read_bytes(), where="here")
    folder = bundle / "engines" / "tensorrt-10.3-sm86"
    folder.mkdir(parents=True)
    entries = []
    for spec in (part for graph in manifest.graphs for part in (graph.split() if separate else (graph,))):
        file = folder / f"{spec.name}.engine"
        file.write_text(json.dumps({"bundle": str(bundle), "graph": spec.name}))
        entries.append(
            EngineEntry(
                graph=spec.name,
                file=file.name,
                profiles=spec.profiles,
                num_bytes=file.stat().st_size,
                sha256=sha256_of(file),
                build_seconds=1.0,
                peak_memory_bytes=None,
            )
        )
    engines = EngineSet(
        schema_version=ENGINES_SCHEMA_VERSION,
        backend=backend,
        tensorrt_version=VERSION,
        compute_capabilities=(host.gpu.compute_capability,),
        platform=host.platform,
        gpu=host.gpu.name,
        driver=host.gpu.driver,
        manifest_sha256=sha256_of(bundle / MANIFEST_NAME),
        detailed_layers=False,
        split_lm_head=1,
        engines=tuple(entries),
    )
    (folder / "engines.json").write_bytes(msgspec.json.encode(engines))
    return folder


def pretend_gpu(
    patch: pytest.MonkeyPatch, cuda: CudaOnHost, host: Any, *, backend: EngineBackend = "tensorrt"
) -> None:
    """Let the runtime find ``cuda`` and one of the two TensorRT packages on it."""

    module = TensorRTOnHost(cuda, backend=backend)

    def load_tensorrt(name: str) -> TensorRT:
        if name != backend:
            raise BackendError(f"backend: expected {name} to be installed, it is not")
        return TensorRT(backend=backend, module=module, version=VERSION)

    patch.setattr(backend_tensorrt, "load_cuda", lambda: cuda)
    patch.setattr(backend_tensorrt, "load_tensorrt", load_tensorrt)
    patch.setattr(backend_tensorrt, "find_host", lambda: host)
    patch.setattr(device_cuda, "cuda_problem", lambda: None)
    patch.setattr(machine, "cuda_problem", lambda: None)
