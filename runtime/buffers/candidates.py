"""Memory for the candidates of a quantized head, see ``trio_edge.runtime.model.head_candidates``."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.buffers.blocks import Block, allocate_tensor
from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.devices.interface import find_profile, shape_at

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.devices.interface import Allocator, DeviceTensor


@final
class CandidateBuffers:
    """Inputs and results of the head on R probe rows; all stages share them."""

    def __init__(self, manifest: Manifest, allocator: Allocator, *, output: DeviceTensor) -> None:
        """Allocate everything; ``output`` [R, D] is the probe's output, which has its place already."""
        self._spec, num_rows = manifest.graph("head"), manifest.schedule.num_probe_rows
        self.profile = find_profile(self._spec, {"S": num_rows, "L": num_rows})
        self.output_on_device = output
        self.output = (
            allocator.allocate_pinned(output.num_bytes, purpose="a probe's output")
            .view(np.float32)
            .reshape(output.shape)
        )
        shapes = {tensor.name: shape_at(tensor.shape, self.profile) for tensor in self._spec.tensors}
        candidates = shapes[graph_io.TOP_IDS]
        self.asked = Block(
            allocator,
            {
                graph_io.HIDDEN: (manifest.dtype, shapes[graph_io.HIDDEN]),
                graph_io.LAST_ROW: ("int32", (num_rows,)),
            },
            purpose="probe rows that enter the head",
        )
        self.asked.host(graph_io.LAST_ROW)[:] = np.arange(num_rows)
        self.found = Block(
            allocator,
            {graph_io.TOP_LOGITS: ("float32", candidates), graph_io.TOP_IDS: ("int32", candidates)},
            purpose="likeliest tokens of the probe rows",
        )
        self.sent = Block(
            allocator,
            {
                graph_io.CANDIDATE_LOGITS: ("float32", candidates),
                graph_io.CANDIDATE_ROWS: (manifest.dtype, (*candidates, manifest.dimensions.hidden_size)),
            },
            purpose="inputs of the head's gradient",
        )
        logits = self._spec.tensor(graph_io.LOGITS)
        self._logits = allocate_tensor(allocator, logits, shapes[graph_io.LOGITS], graph="head")

    def head_tensors(self) -> dict[str, DeviceTensor]:
        """Return the tensors of the head on the probe rows."""
        return {
            **{name: self.asked.tensor(name) for name in (graph_io.HIDDEN, graph_io.LAST_ROW)},
            **{name: self.found.tensor(name) for name in (graph_io.TOP_LOGITS, graph_io.TOP_IDS)},
            graph_io.LOGITS: self._logits,
        }

    def gradient_tensors(self) -> dict[str, DeviceTensor]:
        """Return the tensors that the gradient reads."""
        return {name: self.sent.tensor(name) for name in (graph_io.CANDIDATE_LOGITS, graph_io.CANDIDATE_ROWS)}
