"""Runs a long prefill of a layer range in chunks, so that a CPU never holds all of its attention scores.

The scores of S rows are H S S numbers, of which ONNX Runtime holds several copies: 1.2 GB each for LLaVA-NeXT's 3,136 rows. A
chunk attends to the rows before it as a decode step does, through the inputs for cached rows. They read the buffers that
receive the new keys and values. States of linear attention go from chunk to chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.devices.host import array_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnxruntime as ort
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.devices.interface import DeviceTensor

LARGEST_SCORES = 64 << 20
"""Bytes of the attention scores of a layer, in float32, that one pass may hold."""
CHUNK_ROWS = 256


def has_long_prefill(spec: GraphSpec, profile: Profile, *, num_heads: int) -> bool:
    """Return whether a pass of ``spec`` at ``profile`` is a prefill that is worth chunks."""
    rows = profile.sizes.get("S", 0)
    if not spec.num_layers or profile.sizes.get("C", 0):
        return False
    return rows > CHUNK_ROWS and 4 * num_heads * rows * rows > LARGEST_SCORES


class _Chunk(NamedTuple):
    """A bound pass over some of the rows."""

    rows: slice
    binding: ort.IOBinding
    position_ids: NDArray[np.int32]
    past_length: NDArray[np.int32]
    """Kept alive: the binding has its address."""
    num_rows: NDArray[np.int32]
    """Real rows, for states."""


@final
class ChunkedLaunch:
    """A prefill of a layer range, bound to addresses on the CPU, that runs in chunks."""

    capturable = False

    def __init__(
        self,
        run: Callable[[ort.IOBinding], None],
        session: ort.InferenceSession,
        spec: GraphSpec,
        tensors: Mapping[str, DeviceTensor],
    ) -> None:
        """Bind each chunk.

        Args:
            run: Runs the session with a binding.
            session: Of the range.
            spec: The range.
            tensors: Of a prefill without cached rows.
        """
        self._run, self._session, self._spec, self._tensors = run, session, spec, tensors
        self._position_ids = _array(tensors[graph_io.POSITIONS])
        self._present = {
            name: _array(tensor)
            for name, tensor in tensors.items()
            if name.startswith(graph_io.PRESENT_PREFIX)
        }
        self._num_rows = _array(tensors[graph_io.NUM_ROWS]) if graph_io.NUM_ROWS in tensors else None
        self._states = {
            name: _array(tensor)
            for name, tensor in tensors.items()
            if name.startswith(graph_io.PRESENT_STATES)
        }
        self._past_states = {name: np.zeros_like(state) for name, state in self._states.items()}
        """The states after the chunk before, apart from the new ones: a graph may not write over what it reads."""
        num_rows = self._position_ids.shape[-1]
        self._new = {
            name: np.empty((*whole.shape[:2], min(CHUNK_ROWS, num_rows), whole.shape[3]), whole.dtype)
            for name, whole in self._present.items()
        }
        self._chunks = [
            self._bound(start, min(start + CHUNK_ROWS, num_rows)) for start in range(0, num_rows, CHUNK_ROWS)
        ]

    def enqueue(self) -> None:
        """Run all chunks."""
        for past in self._past_states.values():
            past[...] = 0
        for chunk in self._chunks:
            chunk.position_ids[...] = self._position_ids[..., chunk.rows]
            if self._num_rows is not None:
                start, stop = chunk.rows.start, chunk.rows.stop
                chunk.num_rows[...] = np.clip(self._num_rows - start, 0, stop - start)
            self._run(chunk.binding)
            for name, past in self._past_states.items():
                past[...] = self._states[name]
            for name, whole in self._present.items():
                place = whole[:, :, chunk.rows]
                place[...] = self._new[name].reshape(-1)[: place.size].reshape(place.shape)

    def _bound(self, start: int, stop: int) -> _Chunk:
        count = stop - start
        position_ids = np.empty((*self._position_ids.shape[:-1], count), np.int32)
        past_length, num_rows = np.array([start], np.int32), np.zeros(1, np.int32)
        special = {
            graph_io.POSITIONS: (position_ids.ctypes.data, position_ids.shape),
            graph_io.PAST_LENGTH: (past_length.ctypes.data, (1,)),
            graph_io.NUM_ROWS: (num_rows.ctypes.data, (1,)),
        }
        for name, state in self._past_states.items():
            past = name.replace(graph_io.PRESENT_STATES, graph_io.PAST_STATES, 1)
            special[past] = state.ctypes.data, state.shape
        for name, whole in self._present.items():
            shape = (*whole.shape[:2], count, whole.shape[3])
            special[name] = self._new[name].ctypes.data, shape
            past = name.replace(graph_io.PRESENT_PREFIX, graph_io.PAST_PREFIX, 1)
            seen = whole.shape if start else (*whole.shape[:2], 0, whole.shape[3])
            special[past] = whole.ctypes.data, seen
        binding = self._session.io_binding()
        for tensor in self._spec.tensors:
            bind = binding.bind_input if tensor in self._spec.inputs else binding.bind_output
            given = self._tensors[tensor.name]
            if tensor.name in special:
                address, shape = special[tensor.name]
            elif "S" in tensor.shape:  # hidden states and planes [1, S, D]
                rows = given.rows(start, count)
                address, shape = rows.address, (1, *rows.shape)
            else:  # of a probe in the same graph, without elements
                address, shape = given.address, given.shape
            bind(tensor.name, "cpu", 0, np.dtype(tensor.dtype), shape, address)
        return _Chunk(slice(start, stop), binding, position_ids, past_length, num_rows)


def _array(tensor: DeviceTensor) -> NDArray[Any]:
    """Return a view of a tensor in host memory."""
    return array_at(tensor.address, shape=(tensor.num_bytes,)).view(tensor.dtype).reshape(tensor.shape)
