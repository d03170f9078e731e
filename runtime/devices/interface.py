"""The interface between the orchestration and a machine: memory at fixed addresses, one stream, and engines on it.

    Allocator        memory on the device and pinned memory on the host
    Device           an allocator with one stream: copies, events, captured sequences
    Event            a point in the stream
    Engine           one loaded graph
    Launch           one profile of an engine, bound to addresses once and enqueued any number of times
    LoadedGraphs     what a backend gives: a device and the engines on it

Everything but ``Event.wait`` and ``Device.synchronize`` returns before the device has done it; work happens in the order in
which it was enqueued. Nothing here is thread-safe.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile, TensorSpec

ALIGNMENT = 256
"""Bytes; TensorRT wants the address of every I/O tensor to be a multiple of it."""


class DeviceTensor(NamedTuple):
    """An array in device memory, contiguous."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def rows(self, start: int, count: int) -> DeviceTensor:
        """Return ``count`` rows [count, last axis] from row ``start`` on, all axes but the last taken as one."""
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
    """Gives memory that stays where it is until the device is closed."""

    def allocate(self, num_bytes: int, *, purpose: str) -> int:
        """Return the address of new device memory, all zero, a multiple of ``ALIGNMENT``.

        Args:
            num_bytes: How much.
            purpose: What it is for, for the message when there is none left.

        Raises:
            BackendError: If there is not enough.
        """

    def allocate_pinned(self, num_bytes: int, *, purpose: str) -> NDArray[np.uint8]:
        """Return host memory that the device can copy from and to while the host goes on.

        Raises:
            BackendError: If there is not enough.
        """


class Device(Allocator, Protocol):
    """One device with one stream."""

    @property
    def name(self) -> str:
        """For messages."""

    def upload(self, target: DeviceTensor, source: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device; it must not change before the device has done so."""

    def download(self, target: NDArray[Any], source: DeviceTensor) -> None:
        """Copy to a contiguous host array, which has the values once the device has done so."""

    def copy_rows(self, target: PitchedRows, source: PitchedRows, *, row_bytes: int, num_rows: int) -> None:
        """Copy ``num_rows`` rows of ``row_bytes`` within the device; they do not overlap."""

    def clear(self, target: DeviceTensor) -> None:
        """Write zeros."""

    def event(self) -> Event:
        """Return a new event, not recorded yet."""

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Return a function that enqueues what ``enqueue`` does, as a whole.

        Args:
            enqueue: Enqueues launches and copies at fixed addresses; called once or each time.

        Raises:
            BackendError: If the device cannot capture it.
        """

    def synchronize(self) -> None:
        """Return when everything enqueued is done."""

    def finish(self) -> None:
        """Wait, and release captured sequences: before the engines that they run are closed."""

    def free_bytes(self) -> int | None:
        """Return how much memory is free on the device; None where it does not say."""

    def close(self) -> None:
        """Wait, and release all memory and events."""


class Launch(Protocol):
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

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> Launch:
        """Return a launch of ``profile`` whose inputs and outputs lie at ``tensors``.

        Raises:
            ShapeError: If a tensor is missing, unknown, or of another dtype or shape.
            BackendError: If the engine has no such profile.
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
    memory: dict[str, int]
    """Bytes of device memory by what they are for, as ``buffers.memory.estimate`` names it."""
    notes: list[str] = field(default_factory=list)
    """Harmless problems, one line each."""

    def close(self) -> None:
        """Release everything, also where releasing some of it fails."""
        # Last in, first out: captured sequences, then engines, then the memory that both use.
        with ExitStack() as closing:
            closing.callback(self.device.close)
            for engine in self.engines.values():
                closing.callback(engine.close)
            self.engines.clear()
            self.device.finish()


def find_profile(spec: GraphSpec, sizes: Mapping[str, int]) -> Profile:
    """Return the profile of ``spec`` that has exactly ``sizes``.

    Raises:
        BackendError: If there is none.
    """
    for profile in spec.profiles:
        if profile.sizes == sizes:
            return profile
    known = ", ".join(profile.name for profile in spec.profiles)
    raise BackendError(
        f"{spec.name}: expected one of the profiles {known}, got sizes {dict(sizes)}; export the bundle again"
    )


def shape_at(shape: tuple[int | str, ...], profile: Profile) -> tuple[int, ...]:
    """Return a tensor's shape at a profile; tensors of other pieces than the profile's have no elements."""
    return tuple(profile.sizes.get(size, 0) if isinstance(size, str) else size for size in shape)


def largest_shape(spec: GraphSpec, tensor: TensorSpec) -> tuple[int, ...]:
    """Return the shape that has room for a tensor of ``spec`` in every profile."""
    return max((shape_at(tensor.shape, profile) for profile in spec.profiles), key=math.prod)


def aligned(num_bytes: int) -> int:
    """Return the next multiple of ``ALIGNMENT``."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def array_at(
    address: int, *, shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> NDArray[np.uint8]:
    """Return the host's bytes at ``address`` as an array; whoever owns them must outlive it."""
    return np.asarray(_Memory(address, shape=shape, strides=strides))


class _Memory:
    """Bytes at an address, as numpy's array interface describes them."""

    def __init__(self, address: int, *, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "typestr": "|u1",
            "shape": shape,
            "strides": strides,
        }
