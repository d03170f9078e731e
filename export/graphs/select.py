"""``select_i``: which visual tokens go on to layer l, and the sequence without the others.

| I/O tensor            | shape     | dtype   | filled or read by                                                    |
|-----------------------|-----------|---------|----------------------------------------------------------------------|
| in  hidden_states     | [1, S, D] | model   | the layer range before; [text | visual | text | padding]             |
| in  position_ids      | [A, S]    | int32   | what that range used; A = 1, or 3 for M-RoPE                         |
| in  visual_rows       | [N]       | int32   | runtime: row of each visual token, ascending from the span's start   |
| in  num_visual        | [1]       | int32   | runtime: real visual tokens in the span, at most N                   |
| in  length            | [1]       | int32   | runtime: real rows; the rest is padding                              |
| out kept_hidden_states| [1, R, D] | model   | next layer range; R = S - N + K                                      |
| out kept_position_ids | [A, R]    | int32   | next layer range: 0..R-1 ("compact") or gathered ("preserved")       |
| out kept_indices      | [K]       | int32   | runtime: ascending, into the span that entered; min(K, num_visual) valid |
| out scores            | [N]       | float32 | runtime: saliency, -1 where there is no token                        |
| out unsettled         | [1]       | int32   | runtime: not 0 means that the NMS needs more rounds than exported     |

The graph holds the probed layer and the head a second time (on the device; on disk they are stored once).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trio_edge.trio.compaction import compact_rows

if TYPE_CHECKING:
    from trio_edge.trio.nms import FeatureNms
    from trio_edge.trio.saliency import ProxySaliency


class Select(nn.Module):
    """Saliency of the probe on layer l, feature-space NMS, and the gather of what stays."""

    def __init__(
        self,
        saliency: ProxySaliency,
        nms: FeatureNms,
        rotary: nn.Module,
        *,
        preserve_positions: bool,
    ) -> None:
        super().__init__()
        self.saliency = saliency
        self.nms = nms
        self.rotary = rotary
        self.preserve_positions = preserve_positions

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        visual_rows: Tensor,
        num_visual: Tensor,
        length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return kept hidden states, kept position ids, kept indices, scores and the unsettled count."""
        hidden_SD = hidden_states[0]
        cos, sin = self.rotary(position_ids)
        scores_N = self.saliency(hidden_SD, cos[0], sin[0], visual_rows, num_visual, length)
        kept_K, unsettled = self.nms(hidden_SD.index_select(0, visual_rows), scores_N, num_visual)
        rows_R, _ = compact_rows(
            kept_K,
            visual_rows[:1],
            num_visual,
            length,
            padded_length=hidden_SD.shape[0],
            max_visual=visual_rows.shape[0],
        )
        if self.preserve_positions:
            positions_AR = position_ids.index_select(1, rows_R)
        else:
            positions_AR = torch.arange(rows_R.shape[0]).to(torch.int32).expand(position_ids.shape[0], -1)
        kept_states = hidden_SD.index_select(0, rows_R)
        return kept_states[None], positions_AR, kept_K.to(torch.int32), scores_N, unsettled
