"""Structured device memory: blocks that one copy moves, and stacks of equal tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.devices.interface import ALIGNMENT, DeviceTensor, PitchedRows, aligned, largest_shape

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, TensorSpec
    from trio_edge.runtime.devices.interface import Allocator, Device


@final
class Block:
    """Named tensors in one piece of device memory, with a pinned copy on the host. One copy moves all of them."""

    def __init__(
        self, allocator: Allocator, fields: Mapping[str, tuple[str, tuple[int, ...]]], *, purpose: str
    ) -> None:
        """Allocate both copies for ``fields``: dtype and largest shape by name."""
        self._fields: dict[str, DeviceTensor] = {}
        """By name; addresses are offsets from the block's start."""
        end = 0
        for name, (dtype, shape) in fields.items():
            self._fields[name] = DeviceTensor(end, shape, dtype)
            end += aligned(self._fields[name].num_bytes)
        self._whole = DeviceTensor(allocator.allocate(end, purpose=purpose), (end,), "uint8")
        self._host = allocator.allocate_pinned(end, purpose=purpose)

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def _field(self, name: str, shape: tuple[int, ...] | None) -> DeviceTensor:
        field = self._fields[name]
        return field if shape is None else field._replace(shape=shape)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> DeviceTensor:
        """Return a field on the device, at ``shape`` or its largest shape."""
        field = self._field(name, shape)
        return field._replace(address=self._whole.address + field.address)

    def host(self, name: str, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
        """Return a view of a field's copy on the host, at ``shape`` or its largest shape."""
        field = self._field(name, shape)
        found = self._host[field.address : field.address + field.num_bytes]
        return found.view(field.dtype).reshape(field.shape)

    def upload(self, device: Device) -> None:
        """Copy all fields to the device."""
        device.upload(self._whole, self._host)

    def upload_field(self, device: Device, name: str, shape: tuple[int, ...]) -> None:
        """Copy one field, at ``shape``, to the device."""
        device.upload(self.tensor(name, shape), self.host(name, shape))

    def download(self, device: Device) -> None:
        """Copy all fields to the host."""
        device.download(self._host, self._whole)


def copy_tensor(device: Device, target: DeviceTensor, source: DeviceTensor) -> None:
    """Enqueue a copy of ``source`` to the start of ``target``, cut to the smaller of both."""
    size = min(target.num_bytes, source.num_bytes)
    device.copy_rows(
        PitchedRows(target.address, size), PitchedRows(source.address, size), row_bytes=size, num_rows=1
    )


@final
class Stack:
    """Equal tensors [1, G, rows, E] in a row: keys and values of the layers of one range.

    Where G rows of E elements are no multiple of ``ALIGNMENT``, each tensor is padded with further groups. So all tensors
    start at aligned addresses, and all groups of all tensors are equally far apart: one strided copy reaches them.
    """

    def __init__(self, address: int, *, count: int, shape: tuple[int, ...], dtype: str) -> None:
        self._address, self._count, self._shape, self._dtype = address, count, shape, dtype
        self._row_bytes = shape[-1] * np.dtype(dtype).itemsize
        self._pitch_bytes = shape[-2] * self._row_bytes
        multiple = ALIGNMENT // math.gcd(ALIGNMENT, self._row_bytes)
        self._groups = -(-shape[-3] // multiple) * multiple

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole stack."""
        return self._count * self._groups * self._pitch_bytes

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row, summed over all tensors."""
        return self._count * self._shape[-3] * self._row_bytes

    def tensor(self, index: int) -> DeviceTensor:
        """Return the tensor at ``index``."""
        address = self._address + index * self._groups * self._pitch_bytes
        return DeviceTensor(address, self._shape, self._dtype)

    def empty(self, index: int) -> DeviceTensor:
        """Return the tensor at ``index`` with no rows."""
        return self.tensor(index)._replace(shape=(*self._shape[:-2], 0, self._shape[-1]))

    def copy_to(self, device: Device, target: Stack, *, first_row: int, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` rows of all tensors to ``target``'s, from ``first_row`` on."""
        device.copy_rows(
            PitchedRows(target._address + first_row * target._row_bytes, target._pitch_bytes),
            PitchedRows(self._address, self._pitch_bytes),
            row_bytes=num_rows * self._row_bytes,
            num_rows=self._count * self._groups,
        )


def allocate_tensor(
    allocator: Allocator, tensor: TensorSpec, shape: tuple[int, ...], *, graph: str
) -> DeviceTensor:
    """Return device memory for ``tensor`` of ``graph`` at ``shape``."""
    found = DeviceTensor(0, shape, tensor.dtype)
    return found._replace(address=allocator.allocate(found.num_bytes, purpose=f"{tensor.name} of {graph}"))


def allocate_largest(allocator: Allocator, spec: GraphSpec, tensor: TensorSpec) -> DeviceTensor:
    """Return device memory for ``tensor`` of ``spec``, large enough for every profile."""
    return allocate_tensor(allocator, tensor, largest_shape(spec, tensor), graph=spec.name)
