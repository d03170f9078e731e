"""FastV (arXiv 2403.06764): the visual tokens that the last row of the prompt looked at most, one layer before.

    score_i = mean over heads of softmax(q_last · k / √E)_i        in layer l - 1, which has just run
    kept    = the K largest, in reading order

One stage, in front of layer 2 (counted from 0); position ids are kept ("preserved").

Where we differ from the original. The row is computed again from what entered layer l - 1, so that the layer itself may
run with any attention kernel; the numbers are the same. Of equal scores the lower index comes first (there: TopK's
choice). K is a number of the graph instead of round((1 - R) N) of each picture. Selection runs once, in the prefill, like
the original's variant with a KV cache.
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


class FastV(nn.Module):
    """FastV's selection; a ``StageSelector``."""

    needs_previous = True
    needs_prompt = False

    def __init__(self, layer: Any, *, num_keep: int, image_share: int | None = None) -> None:
        """Hold the layer before the stage.

        Args:
            layer: Decoder layer l - 1.
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
    def for_stage(cls, parts: StageParts) -> FastV:
        """Return the selector of a stage, with the attention of the layer before."""
        return cls(parts.previous_layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens that the last real row attended to most in layer l - 1.

        Raises:
            ScheduleError: If there are fewer than K visual rows.
        """
        assert inputs.previous_SD is not None, "needs_previous"
        check_num_keep(self.num_keep, inputs.visual_rows_N.shape[0])
        scores_N = self.attention.last_row(inputs.previous_SD, inputs)
        kept_K = best_tokens(
            scores_N,
            inputs.num_visual,
            num_keep=self.num_keep,
            image_N=inputs.image_N,
            image_share=self.image_share,
        )
        return Selection(kept_K, scores_N, settled(inputs))
