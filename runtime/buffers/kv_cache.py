"""KV caches of one decoder layer range: allocated once, filled row by row on the device, read in place."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from trio_edge.runtime.buffers.blocks import Stack
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.graph_io import PAST_PREFIX, PRESENT_PREFIX

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.devices.interface import Allocator, Device, DeviceTensor


@final
class KVCache:
    """Keys and values of the layers of one range, [1, G, C, E] each; the first ``length`` rows are valid.

    A range's graph writes new rows to a separate stack (``NewRows``); ``append`` copies them to the end of the valid rows.
    """

    def __init__(self, allocator: Allocator, spec: GraphSpec) -> None:
        """Allocate the buffers for ``spec``, the range's graph; its decode profile has the capacity C."""
        # Inputs and outputs are in the same order, so one strided copy moves the new rows of all layers.
        past = [tensor for tensor in spec.inputs if tensor.name.startswith(PAST_PREFIX)]
        self.capacity = max(profile.sizes.get("C", 0) for profile in spec.profiles)
        self.length = 0
        self._names = [tensor.name for tensor in past]
        self._shape = tuple(self.capacity if axis == "C" else int(axis) for axis in past[0].shape)
        self._dtype = past[0].dtype
        size = Stack(0, count=len(past), shape=self._shape, dtype=self._dtype).num_bytes
        address = allocator.allocate(size, purpose=f"the KV cache of {spec.name}")
        self._stack = Stack(address, count=len(past), shape=self._shape, dtype=self._dtype)

    @property
    def used_bytes(self) -> int:
        """Bytes of the valid rows."""
        return self._stack.bytes_per_row * self.length

    def clear(self) -> None:
        """Forget all rows; the buffers stay."""
        self.length = 0

    def no_rows(self) -> dict[str, DeviceTensor]:
        """Return the graph inputs of a prefill: tensors without rows."""
        return {name: self._stack.empty(index) for index, name in enumerate(self._names)}

    def all_rows(self) -> dict[str, DeviceTensor]:
        """Return the graph inputs of a decode step: tensors with all C rows."""
        return {name: self._stack.tensor(index) for index, name in enumerate(self._names)}

    def stack_like(self, allocator: Allocator, *, rows: int) -> Stack:
        """Return memory for ``rows`` rows of all layers."""
        shape = (*self._shape[:-2], rows, self._shape[-1])
        size = Stack(0, count=len(self._names), shape=shape, dtype=self._dtype).num_bytes
        address = allocator.allocate(size, purpose="kept KV rows")
        return Stack(address, count=len(self._names), shape=shape, dtype=self._dtype)

    def save(self, device: Device, target: Stack, *, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` rows to ``target``."""
        self._stack.copy_to(device, target, first_row=0, num_rows=num_rows)

    def restore(self, device: Device, source: Stack, *, num_rows: int) -> None:
        """Enqueue a copy of ``num_rows`` rows from ``source``; they become the valid rows."""
        source.copy_to(device, self._stack, first_row=0, num_rows=num_rows)
        self.length = num_rows

    def append(self, device: Device, new: NewRows, *, num_rows: int) -> None:
        """Enqueue a copy of the first ``num_rows`` new rows to the end of the valid rows.

        Raises:
            ShapeError: If the cache is too small.
        """
        end = self.length + num_rows
        if end > self.capacity:
            raise ShapeError(
                f"KV cache: expected at most {self.capacity} rows, got {end}; export with a larger --max-new-tokens"
            )
        new.stack.copy_to(device, self._stack, first_row=self.length, num_rows=num_rows)
        self.length = end


@final
class NewRows:
    """New keys and values that a layer range writes, [1, G, S, E] each."""

    def __init__(self, address: int, spec: GraphSpec, *, rows: int) -> None:
        """Lay out the outputs of ``spec`` from ``address`` on, for S = ``rows``."""
        present = [tensor for tensor in spec.outputs if tensor.name.startswith(PRESENT_PREFIX)]
        shape = tuple(rows if axis == "S" else int(axis) for axis in present[0].shape)
        self.stack = Stack(address, count=len(present), shape=shape, dtype=present[0].dtype)
        self._names = [tensor.name for tensor in present]

    def outputs(self) -> dict[str, DeviceTensor]:
        """Return the graph outputs."""
        return {name: self.stack.tensor(index) for index, name in enumerate(self._names)}
