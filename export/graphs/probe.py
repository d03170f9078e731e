"""The probe of a stage in three pieces, each in the graph that reads the same weights, so that no weight is stored twice.

    probe      in the graph of layers l…    hidden states → output of layer l on the probe rows, and its state
    gradient   in the graph of the head     output on the probe rows → gradient of the proxy loss there (``ProbeHead``)
    saliency   in the graph of layers l…    gradient and state → a score for each visual token

``export/tracing/tables.py`` lists the tensors.

Quantized layers: the forward half shares the layer's own products (``assembly.pieces.join``), for tensorrt-rtx 1.7 can end
abnormally where two products of an engine read the same INT4 weight. The backward half is a graph of its own; it reads the
weights of the attention alone, as its gradient goes around the MLP. The gradient of a quantized head reads no weight at
all, but the rows of the likeliest tokens (``CandidateHead``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trio_edge.trio.saliency import ProbeState

if TYPE_CHECKING:
    from trio_edge.export.graphs.attention import RotaryTables
    from trio_edge.trio.saliency import ProxySaliency


class _Half(nn.Module):
    def __init__(self, saliency: ProxySaliency, rotary: RotaryTables) -> None:
        super().__init__()
        self.saliency = saliency
        self.rotary = rotary


class Probe(_Half):
    """The forward half of a probe."""

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, visual_rows: Tensor, rows: Tensor, length: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the layer's output on ``rows``, their state, the attention to visual tokens, and the keys if they are needed."""
        cos, sin = self.rotary(position_ids)
        state = self.saliency.attend(
            hidden_states[0], cos[0], sin[0], visual_rows, rows, length, position_ids[0]
        )
        return tuple(tensor for tensor in state if tensor is not None)


class Saliency(_Half):
    """The backward half of a probe."""

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        visual_rows: Tensor,
        num_visual: Tensor,
        gradient: Tensor,
        rows_state: Tensor,
        attention: Tensor,
        *keys: Tensor,
    ) -> Tensor:
        """Return the scores of the visual tokens."""
        cos, sin = self.rotary(position_ids)
        state = ProbeState(gradient, rows_state, attention, keys[0] if keys else None)
        scores: Tensor = self.saliency.scores(
            state, gradient, hidden_states[0], cos[0], sin[0], visual_rows, num_visual
        )
        return scores
