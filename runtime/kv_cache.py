"""KV buffers of one decoder layer range: allocated once, written row by row, read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.manifest import Dimensions, GraphSpec


@final
class KVCache:
    """Keys and values of the layers of one range, [layers, 1, G, C, E] each, of which ``length`` rows are valid."""

    def __init__(self, spec: GraphSpec, dimensions: Dimensions, *, capacity: int, dtype: str) -> None:
        """Allocate the buffers.

        Args:
            spec: The range's graph; its inputs and outputs name the layers.
            dimensions: For G and E.
            capacity: C, rows.
            dtype: Element type.
        """
        shape = (spec.num_layers, 1, dimensions.num_kv_heads, capacity, dimensions.head_size)
        first = spec.first_layer or 0
        self.capacity = capacity
        self.length = 0
        self._buffers: dict[str, NDArray[Any]] = {}
        self._rows_of: dict[str, str] = {}
        self._no_rows: dict[str, NDArray[Any]] = {}
        for part in ("key", "value"):
            buffer = np.zeros(shape, dtype=dtype)
            for index in range(spec.num_layers):
                name = f"past_key_values.{first + index}.{part}"
                self._buffers[name] = buffer[index]
                self._no_rows[name] = np.zeros((*shape[1:3], 0, shape[4]), dtype=dtype)
                self._rows_of[name] = f"present.{first + index}.{part}"

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the valid rows."""
        return self.num_bytes * self.length // self.capacity

    def clear(self) -> None:
        """Forget all rows; the buffers stay."""
        self.length = 0

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Return the graph inputs that hold the past: views of the buffers, or no rows before a prefill."""
        return self._buffers if self.length else self._no_rows

    def append(self, outputs: Mapping[str, NDArray[Any]], *, num_rows: int) -> None:
        """Write the first ``num_rows`` new rows of a graph's ``present`` outputs behind the valid ones.

        Raises:
            ShapeError: If they do not fit.
        """
        end = self.length + num_rows
        if end > self.capacity:
            raise ShapeError(
                f"KV cache: expected at most {self.capacity} rows, got {end}; export with a larger --max-new-tokens"
            )
        for name, buffer in self._buffers.items():
            buffer[:, :, self.length : end] = outputs[self._rows_of[name]][:, :, :num_rows]
        self.length = end
