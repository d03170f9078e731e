"""The interface to a device: memory at fixed addresses, one stream, and engines on it.

    Allocator        memory on the device and pinned memory on the host
    Device           an allocator with one stream: copies, events, captured sequences
    Event            a point in the stream
    Engine           one loaded graph
    PreparedLaunch   one profile of an engine, bound to addresses once and enqueued any number of times
    LoadedGraphs     a device and the engines on it, as a backend returns them

All calls except ``Event.wait`` and ``Device.synchronize`` only enqueue work, which the device does in this order. Nothing
here is thread-safe.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile

ALIGNMENT = 256
"""Bytes; TensorRT requires the address of every I/O tensor to be a multiple of it."""


class DeviceTensor(NamedTuple):
    """A contiguous array in device memory."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, count: int) -> DeviceTensor:
        """Return ``count`` rows [count, last axis] from row ``start`` on, with all axes but the last flattened."""
        width = self.shape[-1]
        offset = start * width * np.dtype(self.dtype).itemsize
        return DeviceTensor(self.address + offset, (count, width), self.dtype)


class PitchedRows(NamedTuple):
    """Rows of bytes that lie ``pitch_bytes`` apart."""

    address: int
    pitch_bytes: int


class Event(Protocol):
    """A point in a device's stream."""

    def record(self) -> None:
        """Move the point to the end of what has been enqueued."""

    def wait(self) -> None:
        """Return when the device has reached the point."""

    def milliseconds_since(self, earlier: Event) -> float:
        """Return the device's time between two points that it has reached."""


class Allocator(Protocol):
    """Allocates memory that stays valid until the device is closed."""

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        """Return the address, a multiple of ``ALIGNMENT``, of new device memory filled with zeros.

        Raises:
            BackendError: If there is too little memory; the message names ``purpose``.
        """

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        """Return host memory that the device can copy from and to while the host goes on.

        Raises:
            BackendError: If there is too little memory.
        """


class Device(Allocator, Protocol):
    """One device with one stream."""

    @property
    def name(self) -> str:
        """Name for messages."""

    def upload(self, target: DeviceTensor, source: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device; it must not change until the copy is done."""

    def download(self, target: NDArray[Any], source: DeviceTensor) -> None:
        """Copy to a contiguous host array, which is valid when the copy is done."""

    def copy_rows(self, target: PitchedRows, source: PitchedRows, *, row_bytes: int, num_rows: int) -> None:
        """Copy ``num_rows`` rows of ``row_bytes`` within the device; source and target do not overlap."""

    def clear(self, target: DeviceTensor) -> None:
        """Write zeros."""

    def event(self) -> Event:
        """Return a new event, not recorded yet."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return a function that enqueues the launches and copies of ``enqueue`` as one unit.

        Raises:
            BackendError: If the device cannot capture it.
        """

    def synchronize(self) -> None:
        """Return when everything enqueued is done."""

    def finish(self) -> None:
        """Wait, then release captured sequences; call it before their engines are closed."""

    def free_bytes(self) -> int | None:
        """Return the free memory of the device in bytes; None if it is not known."""

    def close(self) -> None:
        """Wait, then release all memory and events."""


class PreparedLaunch(Protocol):
    """One profile of an engine at fixed addresses."""

    @property
    def capturable(self) -> bool:
        """Whether ``Device.capture`` may capture it, once it has run."""

    def enqueue(self) -> None:
        """Run it on the device's stream.

        Raises:
            BackendError: If the backend refuses or fails.
        """


class Engine(Protocol):
    """One loaded graph."""

    @property
    def spec(self) -> GraphSpec:
        """The graph's entry in the manifest."""

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> PreparedLaunch:
        """Return a launch of ``profile`` whose inputs and outputs lie at ``tensors``.

        ``tensors`` have the names, dtypes and shapes of the graph at the profile, as ``Memory.at`` returns them.
        """

    def close(self) -> None:
        """Release the engine; its launches cannot run afterwards."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedGraphs:
    """Engines and the device that they run on."""

    device: Device
    engines: dict[str, Engine]
    """By graph name."""
    memory: dict[str, int] = field(default_factory=dict)
    """Bytes of device memory by purpose, see ``devices.memory.estimate``."""
    notes: list[str] = field(default_factory=list)
    """Harmless problems, one line each."""

    def close(self) -> None:
        """Release everything, even if releasing a part fails."""
        # In this order: captured sequences, engines, then the memory of both.
        with ExitStack() as closing:
            closing.callback(self.device.close)
            for engine in self.engines.values():
                closing.callback(engine.close)
            self.engines.clear()
            self.device.finish()


def aligned(num_bytes: int) -> int:
    """Return the next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
