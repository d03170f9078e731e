"""PyramidDrop (arXiv 2410.17247): the visual tokens that the last instruction token is about to look at most.

    score_i = mean over heads of softmax(q_last · k / √E)_i        in layer l, the next one, with the current positions
    kept    = the K largest, in reading order

Stages in front of layers 8, 16 and 24 of 32, each keeping λ of the tokens before it, λ = 0.5; position ids are numbered
again after each ("compact").

Where we differ from the original. The last instruction token is the last real row of the prompt, which is what the
original's index comes to when the prompt ends there. Of equal scores the lower index comes first. K is a number of the
graph instead of a share of each picture's tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from trio_edge.trio.selectors.interface import (
    Selection,
    StageInputs,
    StageParts,
    best_tokens,
    check_num_keep,
)
from trio_edge.trio.selectors.stages.row_attention import RowAttention, settled


class PyramidDrop(nn.Module):
    """PyramidDrop's selection; a ``StageSelector``."""

    needs_previous = False
    needs_prompt = False

    def __init__(self, layer: Any, *, num_keep: int, image_share: int | None = None) -> None:
        """Hold the layer after the stage.

        Args:
            layer: Decoder layer l.
            num_keep: K.
            image_share: Tokens that each image keeps at least; None where all images share one budget.

        Raises:
            ScheduleError: If K is below 1.
        """
        super().__init__()
        check_num_keep(num_keep)
        self.attention = RowAttention(layer)
        self.num_keep = num_keep
        self.image_share = image_share

    @classmethod
    def for_stage(cls, parts: StageParts) -> PyramidDrop:
        """Return the selector of a stage, with the attention of the next layer."""
        return cls(parts.layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens that the last real row attends to most in layer l.

        Raises:
            ScheduleError: If there are fewer than K visual rows.
        """
        check_num_keep(self.num_keep, inputs.visual_rows_N.shape[0])
        scores_N = self.attention.last_row(inputs.hidden_SD, inputs)
        kept_K = best_tokens(
            scores_N,
            inputs.num_visual,
            num_keep=self.num_keep,
            image_N=inputs.image_N,
            image_share=self.image_share,
        )
        return Selection(kept_K, scores_N, settled(inputs))
