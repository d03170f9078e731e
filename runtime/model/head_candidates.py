"""The likeliest tokens of the probe rows, and their rows of the lm_head, for the gradient of a quantized head.

The gradient of an exact head reads the whole lm_head backwards. A quantized weight cannot serve both directions, so this
would take a second copy. The loss over the T likeliest tokens needs T rows instead, which the host reads from a file: after
a probe's forward half it sends the probe rows to the head, and after the head the rows to the gradient. Each waits for the
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.bundle import graph_io as io

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Launch
    from trio_edge.runtime.bundle.reader import TokenTable
    from trio_edge.runtime.devices.interface import Device
    from trio_edge.runtime.devices.memory import Memory


@final
class EnterHead:
    """Sends a probe's output to the head, in the head's element type."""

    capturable = False

    def __init__(self, device: Device, memory: Memory, spec: Launch) -> None:
        self._device, self._memory = device, memory
        self._source = memory.tensor(spec.inputs[io.PROBE_OUTPUT])
        pinned = device.allocate_pinned(self._source.num_bytes, purpose="a probe's output")
        self._output = pinned.view(np.float32).reshape(self._source.shape)
        self._hidden = memory.host(spec.outputs[io.HIDDEN])
        memory.host(spec.outputs[io.LAST_ROW])[:] = np.arange(len(self._output))

    def enqueue(self) -> None:
        """Download the output and send it."""
        self._device.download(self._output, self._source)
        self._device.synchronize()
        limits = np.finfo(self._hidden.dtype)
        self._hidden[0] = np.clip(self._output, limits.min, limits.max)
        self._memory.send(self._device, "entering")


@final
class LikeliestRows:
    """Sends the logits of the likeliest tokens and their rows of the lm_head."""

    capturable = False

    def __init__(self, device: Device, memory: Memory, spec: Launch, *, rows: TokenTable) -> None:
        """``rows`` are those of the lm_head."""
        self._device, self._memory, self._rows = device, memory, rows
        self._found = tuple(memory.host(spec.inputs[name]) for name in (io.TOP_LOGITS, io.TOP_IDS))
        self._sent = tuple(
            memory.host(spec.outputs[name]) for name in (io.CANDIDATE_LOGITS, io.CANDIDATE_ROWS)
        )

    def enqueue(self) -> None:
        """Download what the head found, and send the rows."""
        self._memory.fetch(self._device, "found")
        self._device.synchronize()
        logits, ids = ordered(*self._found)
        self._sent[0][:] = logits
        self._sent[1][:] = self._rows[ids]
        self._memory.send(self._device, "likeliest")


def ordered(
    logits: NDArray[np.float32], ids: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return both [R, T] by descending logit, equal ones by ascending id; the graph leaves their order open."""
    order = np.lexsort((ids, -logits))
    return np.take_along_axis(logits, order, axis=-1), np.take_along_axis(ids, order, axis=-1)
