"""PyramidDrop (arXiv 2410.17247): keeps the visual tokens with the most attention of the last prompt row in layer l.

    score_i = mean over heads of softmax(q_last · k / √E)_i        in layer l, the next one, with the current positions
    kept    = the K largest, in reading order

Stages come before layers 8, 16 and 24 of 32; each keeps λ = 0.5 of its tokens. Position ids are renumbered after each
("compact").

Differences from the original: the last instruction token is the last real row of the prompt, which the original's index
also gives if the prompt ends there. Of equal scores the lower index comes first. K is fixed instead of a share of each
image's tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trio_edge.trio.selectors.interface import Selection, StageInputs, StageParts, check_num_keep
from trio_edge.trio.selectors.stages.row_attention import RowAttention


class PyramidDrop(nn.Module):
    """PyramidDrop's selection; a ``StageSelector``."""

    def __init__(self, layer: Any, *, num_keep: int, image_share: int | None = None) -> None:
        """Hold decoder layer l; raise ScheduleError if K is below 1. ``image_share`` is that of ``StageParts``."""
        super().__init__()
        check_num_keep(num_keep)
        self.attention = RowAttention(layer)
        self.num_keep = num_keep
        self.image_share = image_share

    @classmethod
    def for_stage(cls, parts: StageParts) -> PyramidDrop:
        """Return the selector of a stage, which reads the attention of layer l."""
        return cls(parts.layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens with the most attention of the last real row in layer l; raise ScheduleError if N < K."""
        return self.attention.most_attended(
            inputs.hidden_SD, inputs, num_keep=self.num_keep, image_share=self.image_share
        )
