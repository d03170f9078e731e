"""The probe of a stage in three pieces, so that no weight is needed twice: they stand next to what reads the same ones.

    probe      next to the layers from l on   hidden states → output of layer l on the probe rows, and its state
    gradient   next to the head               output on the probe rows → gradient of the proxy loss there (``ProbeHead``)
    saliency   next to the layers from l on   gradient and state → a score for each visual token

Tensors are listed in ``trio_edge.runtime.bundle.graph_io``: ``probe_tensors``, ``gradient_tensors``, ``saliency_tensors``.
Where layers or head are quantized, these stand in graphs of their own instead: a decode step would dequantize for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trio_edge.trio.saliency import ProbeState

if TYPE_CHECKING:
    from trio_edge.export.graphs.rope import RotaryTables
    from trio_edge.trio.saliency import ProxySaliency


class Probe(nn.Module):
    """The forward half."""

    def __init__(self, saliency: ProxySaliency, rotary: RotaryTables) -> None:
        super().__init__()
        self.saliency = saliency
        self.rotary = rotary

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, visual_rows: Tensor, rows: Tensor, length: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the layer's output on ``rows``, their state, the attention to visual tokens, and keys if there are any."""
        cos, sin = self.rotary(position_ids)
        state = self.saliency.attend(hidden_states[0], cos[0], sin[0], visual_rows, rows, length)
        return tuple(tensor for tensor in state if tensor is not None)


class Saliency(nn.Module):
    """The backward half."""

    def __init__(self, saliency: ProxySaliency, rotary: RotaryTables) -> None:
        super().__init__()
        self.saliency = saliency
        self.rotary = rotary

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
