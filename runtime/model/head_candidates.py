"""The likeliest tokens of the probe rows, and their rows of the lm_head, for the gradient of a quantized head.

The gradient of an exact head reads the whole lm_head backwards. A quantized weight cannot serve both directions, so this
would take a second copy. The loss over the T likeliest tokens needs T rows instead, which the host reads from a file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.bundle import graph_io

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.buffers.candidates import CandidateBuffers
    from trio_edge.runtime.bundle.token_table import TokenTable
    from trio_edge.runtime.devices.interface import Device, Engine


@final
class HeadCandidates:
    """A launch after a probe's forward half and before the head's gradient. It waits for the device twice."""

    capturable = False

    def __init__(self, device: Device, head: Engine, buffers: CandidateBuffers, rows: TokenTable) -> None:
        """Bind the head at all probe rows; ``rows`` are those of the lm_head."""
        self._device, self._buffers, self._rows = device, buffers, rows
        self._head = head.prepare(buffers.profile, buffers.head_tensors())

    def enqueue(self) -> None:
        """Run the head on the probe rows and send the candidates to the device.

        Raises:
            BackendError: If the head fails.
        """
        device, buffers = self._device, self._buffers
        device.download(buffers.output, buffers.output_on_device)
        device.synchronize()
        hidden = buffers.asked.host(graph_io.HIDDEN)
        limits = np.finfo(hidden.dtype)
        hidden[0] = np.clip(buffers.output, limits.min, limits.max)
        buffers.asked.upload(device)
        self._head.enqueue()
        buffers.found.download(device)
        device.synchronize()
        logits, ids = ordered(buffers.found.host(graph_io.TOP_LOGITS), buffers.found.host(graph_io.TOP_IDS))
        buffers.sent.host(graph_io.CANDIDATE_LOGITS)[:] = logits
        buffers.sent.host(graph_io.CANDIDATE_ROWS)[:] = self._rows[ids]
        buffers.sent.upload(device)


def ordered(
    logits: NDArray[np.float32], ids: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return both [R, T] by descending logit, equal ones by ascending id; the graph leaves their order open."""
    order = np.lexsort((ids, -logits))
    return np.take_along_axis(logits, order, axis=-1), np.take_along_axis(ids, order, axis=-1)
