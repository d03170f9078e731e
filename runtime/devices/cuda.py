"""An NVIDIA GPU as a device, through cuda-python. No other file imports cuda-python.

It needs only the GPU's driver and the package ``cuda-python``, which brings the CUDA runtime.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.host import array_at
from trio_edge.runtime.devices.machine import available_memory_bytes, cuda_problem, find_gpu, is_jetson

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.devices.interface import DeviceTensor, Event, PitchedRows

_LOWER_MEMORY = "close other programs, or export with fewer --image-size, --max-text or --max-new-tokens"


def load_cuda() -> Any:
    """Return the module ``cuda.bindings.runtime``.

    Raises:
        BackendError: If there is no GPU, or the package is missing or cannot be imported.
    """
    if (problem := cuda_problem()) is not None:
        raise BackendError(f"backend: {problem}")
    try:
        from cuda.bindings import runtime
    except (ImportError, OSError) as error:
        line = " ".join(str(error).split())
        raise BackendError(
            f"backend: expected a cuda-python that can be imported, got: {line}; install 12.6.1 or newer"
        ) from None
    return runtime


@final
class CudaDevice:
    """The first GPU, with a stream of its own."""

    name = "GPU"

    def __init__(self, cuda: Any) -> None:
        """Open the GPU with ``cuda``, the module ``cuda.bindings.runtime``.

        Raises:
            BackendError: If the driver refuses.
        """
        self._cuda = cuda
        self._success = cuda.cudaError_t.cudaSuccess
        self._memory: list[int] = []
        self._pinned: list[int] = []
        self._events: list[_CudaEvent] = []
        self._graphs: list[Any] = []
        self._call("cudaSetDevice", 0)
        # Non-blocking, so that it does not wait for other libraries' work on the default stream.
        self._stream = self._call("cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)
        self._open = True

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that enqueue on it."""
        return int(self._stream)

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        """Allocate zeroed device memory."""
        # At least 1 byte: cudaMalloc returns no address for 0 bytes.
        address = int(self._allocated("cudaMalloc", max(1, num_bytes), purpose))
        self._memory.append(address)
        self._call("cudaMemsetAsync", address, 0, num_bytes, self._stream)
        return address

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        """Allocate zeroed pinned memory."""
        address = int(self._allocated("cudaMallocHost", max(1, num_bytes), f"{purpose}, on the host"))
        self._pinned.append(address)
        memory = array_at(address, shape=(num_bytes,))
        memory[:] = 0
        return memory

    def upload(self, target: DeviceTensor, source: NDArray[Any]) -> None:
        """Copy an array to the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target.address, source.ctypes.data, source.nbytes, kind, self._stream)

    def download(self, target: NDArray[Any], source: DeviceTensor) -> None:
        """Copy to an array on the host."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source.address, target.nbytes, kind, self._stream)

    def copy_rows(self, target: PitchedRows, source: PitchedRows, *, row_bytes: int, num_rows: int) -> None:
        """Copy rows within the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call("cudaMemcpy2DAsync", *target, *source, row_bytes, num_rows, kind, self._stream)

    def clear(self, target: DeviceTensor) -> None:
        """Write zeros."""
        self._call("cudaMemsetAsync", target.address, 0, target.num_bytes, self._stream)

    def event(self) -> Event:
        """Return a new event."""
        event = _CudaEvent(self._call("cudaEventCreate"), stream=self._stream, call=self._call)
        self._events.append(event)
        return event

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Capture a CUDA graph and return a function that launches it."""
        # Thread-local, so that an allocation by another thread does not break the capture.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self._stream, mode)
        captured = executable = None
        try:
            try:
                enqueue()
            finally:  # otherwise every later call fails
                status, captured = self._cuda.cudaStreamEndCapture(self._stream)
            self._check("cudaStreamEndCapture", status)
            executable = self._call("cudaGraphInstantiate", captured, 0)
        finally:
            if captured is not None:
                self._cuda.cudaGraphDestroy(captured)
            if executable is None:
                self._cuda.cudaGetLastError()  # clears the error, which TensorRT would report as its own
        self._graphs.append(executable)
        return lambda: self._call("cudaGraphLaunch", executable, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream; a closed device has nothing to wait for."""
        if self._open:
            self._call("cudaStreamSynchronize", self._stream)

    def finish(self) -> None:
        """Wait for the stream, then release captured graphs."""
        try:
            self.synchronize()
        finally:
            for executable in self._graphs:
                self._cuda.cudaGraphExecDestroy(executable)
            self._graphs.clear()

    def free_bytes(self) -> int | None:
        """Return the free memory in bytes; on a Jetson including memory that the system can take back."""
        free = int(self._call("cudaMemGetInfo")[0])
        return max(free, available_memory_bytes() or 0) if is_jetson() else free

    def close(self) -> None:
        """Release everything; errors of the driver are ignored, so that as much as possible is released."""
        if not self._open:
            return
        self._open = False
        cuda = self._cuda
        cuda.cudaStreamSynchronize(self._stream)
        for event in self._events:
            cuda.cudaEventDestroy(event.handle)
        for address in self._memory:
            cuda.cudaFree(address)
        for address in self._pinned:
            cuda.cudaFreeHost(address)
        cuda.cudaStreamDestroy(self._stream)
        for owned in (self._events, self._memory, self._pinned):
            owned.clear()

    def _allocated(self, function: str, num_bytes: int, purpose: str) -> Any:
        status, address = getattr(self._cuda, function)(num_bytes)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._cuda.cudaGetLastError()  # clears the error, which the next call would report again
            _, free, total = self._cuda.cudaMemGetInfo()
            raise BackendError(
                f"GPU memory: expected {num_bytes / 1e6:.1f} MB for {purpose}, got {free / 1e6:.1f} MB free of"
                f" {total / 1e6:.1f} MB; {_LOWER_MEMORY}"
            )
        self._check(function, status)
        return address

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime and return its result: an empty tuple, one value or a tuple."""
        result = getattr(self._cuda, function)(*arguments)
        if result[0] != self._success:
            self._check(function, result[0])
        return result[1] if len(result) == 2 else result[1:]

    def _check(self, function: str, status: Any) -> None:
        if status == self._success:
            return
        if status == self._cuda.cudaError_t.cudaErrorInsufficientDriver:
            raise BackendError(_older_driver())
        _, name = self._cuda.cudaGetErrorName(status)
        _, text = self._cuda.cudaGetErrorString(status)
        raise BackendError(
            f"GPU: expected {function} to succeed, got {name.decode()} ({text.decode()}); see dmesg, or use"
            " --backend onnxruntime"
        )


@final
class _CudaEvent:
    def __init__(self, handle: Any, *, stream: Any, call: Callable[..., Any]) -> None:
        self.handle = handle
        self._stream, self._call = stream, call

    def record(self) -> None:
        self._call("cudaEventRecord", self.handle, self._stream)

    def wait(self) -> None:
        self._call("cudaEventSynchronize", self.handle)

    def milliseconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _CudaEvent)
        return float(self._call("cudaEventElapsedTime", earlier.handle, self.handle))


def _older_driver() -> str:
    gpu = find_gpu()
    driver = "an older one" if gpu is None else f"{gpu.driver}"
    release = None if gpu is None else re.search(r"CUDA (\d+\.\d+)", gpu.driver)
    wanted = "its CUDA" if release is None else f'its CUDA: pip install "cuda-python=={release[1]}.*"'
    return f"GPU: expected a driver for the CUDA of the installed cuda-python, got {driver}; install the cuda-python of {wanted}"
