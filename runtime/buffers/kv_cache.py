"""KV caches of decoder layer ranges: allocated once, filled row by row on the device, read in place."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.devices.interface import ALIGNMENT, DeviceTensor, PitchedRows

if TYPE_CHECKING:
    from trio_edge.runtime.devices.interface import Allocator, Device


@final
class Stack:
    """Equal tensors [1, G, rows, E] in a row: keys and values of the layers of one range.

    Where G rows of E elements are no multiple of ``ALIGNMENT``, each tensor is padded with further groups. So all tensors
    start at aligned addresses, and all groups of all tensors are equally far apart: one strided copy reaches them.
    """

    def __init__(self, address: int, *, count: int, shape: tuple[int, ...], dtype: str) -> None:
        self.address, self.shape, self._count, self._dtype = address, shape, count, dtype
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
        return self._count * self.shape[-3] * self._row_bytes

    def moved(self, address: int) -> Stack:
        """Return the same stack at another address."""
        return Stack(address, count=self._count, shape=self.shape, dtype=self._dtype)

    def of_rows(self, allocator: Allocator, rows: int, *, purpose: str) -> Stack:
        """Return new memory for as many tensors of ``rows`` rows."""
        shape = (*self.shape[:-2], rows, self.shape[-1])
        found = Stack(0, count=self._count, shape=shape, dtype=self._dtype)
        return found.moved(allocator.allocate(found.num_bytes, purpose=purpose))

    def tensor(self, index: int) -> DeviceTensor:
        """Return the tensor at ``index``."""
        address = self.address + index * self._groups * self._pitch_bytes
        return DeviceTensor(address, self.shape, self._dtype)

    def copy_to(self, device: Device, target: Stack, *, first_row: int, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` rows of all tensors to ``target``'s, from ``first_row`` on."""
        device.copy_rows(
            PitchedRows(target.address + first_row * target._row_bytes, target._pitch_bytes),
            PitchedRows(self.address, self._pitch_bytes),
            row_bytes=num_rows * self._row_bytes,
            num_rows=self._count * self._groups,
        )


@final
class KVCache:
    """Keys and values of the layers of one range, [1, G, C, E] each; the first ``length`` rows are valid.

    A range's graph writes new rows to another stack; ``append`` copies them to the end of the valid rows.
    """

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.capacity = stack.shape[-2]
        self.length = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of the valid rows."""
        return self.stack.bytes_per_row * self.length

    def clear(self) -> None:
        """Forget all rows; the memory stays."""
        self.length = 0

    def restore(self, device: Device, source: Stack, *, num_rows: int) -> None:
        """Enqueue a copy of ``num_rows`` rows from ``source``; they become the valid rows."""
        source.copy_to(device, self.stack, first_row=0, num_rows=num_rows)
        self.length = num_rows

    def append(self, device: Device, new: Stack, *, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` new rows to the end of the valid rows.

        Raises:
            ShapeError: If the cache is too small.
        """
        end = self.length + num_rows
        if end > self.capacity:
            raise ShapeError(
                f"KV cache: expected at most {self.capacity} rows, got {end}; export with a larger --max-new-tokens"
            )
        new.copy_to(device, self.stack, first_row=self.length, num_rows=num_rows)
        self.length = end
