"""The CPU as a device: its memory is the host's, and work runs when it is enqueued."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.interface import ALIGNMENT, DeviceTensor, Event, PitchedRows

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


@final
class HostDevice:
    """The CPU, with the memory of this process."""

    name = "CPU"

    def __init__(self) -> None:
        self._memory: dict[int, NDArray[np.uint8]] = {}

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        """Allocate zeroed device memory."""
        # numpy aligns to 16 bytes only. The alignment of a GPU keeps layouts, and their tests, equal.
        memory = self.allocate_pinned(num_bytes + ALIGNMENT, purpose=purpose)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[address] = memory
        return address

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        """Allocate ordinary host memory."""
        try:
            return np.zeros(num_bytes, np.uint8)
        except (MemoryError, OverflowError, ValueError):  # the last two for sizes beyond the address space
            raise BackendError(
                f"memory: expected {num_bytes / 1e6:.1f} MB for {purpose}, got none; close other programs"
            ) from None

    def upload(self, target: DeviceTensor, source: NDArray[Any]) -> None:
        """Copy an array to the device."""
        array_at(target.address, shape=(source.nbytes,))[:] = source.reshape(-1).view(np.uint8)

    def download(self, target: NDArray[Any], source: DeviceTensor) -> None:
        """Copy to an array on the host."""
        target.reshape(-1).view(np.uint8)[:] = array_at(source.address, shape=(target.nbytes,))

    def copy_rows(self, target: PitchedRows, source: PitchedRows, *, row_bytes: int, num_rows: int) -> None:
        """Copy rows within the device."""
        shape = (num_rows, row_bytes)
        rows = array_at(source.address, shape=shape, strides=(source.pitch_bytes, 1))
        array_at(target.address, shape=shape, strides=(target.pitch_bytes, 1))[...] = rows

    def clear(self, target: DeviceTensor) -> None:
        """Write zeros."""
        array_at(target.address, shape=(target.num_bytes,))[:] = 0

    def event(self) -> Event:
        """Return a new event."""
        return _HostEvent()

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return ``enqueue``: capturing saves nothing on a CPU."""
        return enqueue

    def synchronize(self) -> None:
        """Do nothing: work runs when it is enqueued."""

    def finish(self) -> None:
        """Do nothing: there are no captured graphs."""

    def free_bytes(self) -> int | None:
        """Return None: the system can take back the pages of mapped weight files."""
        return None

    def close(self) -> None:
        """Release all memory."""
        self._memory.clear()


@final
class _HostEvent:
    def __init__(self) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def wait(self) -> None:
        pass

    def milliseconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, _HostEvent)
        return 1e3 * (self.seconds - earlier.seconds)


def array_at(
    address: int, *, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> NDArray[np.uint8]:
    """Return the host's bytes at ``address`` as an array; their owner must outlive it."""
    memory = {"version": 3, "data": (address, False), "typestr": "|u1", "shape": shape, "strides": strides}
    return np.asarray(SimpleNamespace(__array_interface__=memory))
