"""Norm: the visual tokens with the largest hidden states."""

from __future__ import annotations

from trio_edge.trio.selectors.interface import KeepingModule, Selection, StageInputs, StageParts, best_tokens
from trio_edge.trio.selectors.stages.row_attention import at_visual_tokens, real_rows, settled


class Norm(KeepingModule):
    """See ``StageSelector``."""

    @classmethod
    def for_stage(cls, parts: StageParts) -> Norm:
        """See ``StageSelector.for_stage``; ``parts`` also has the layers around the stage."""
        return cls(num_keep=parts.num_keep)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens with the largest hidden states."""
        rows_SD = real_rows(inputs.hidden_SD, inputs.length)
        scores_N = at_visual_tokens((rows_SD * rows_SD).sum(-1), inputs)
        kept_K = best_tokens(scores_N, inputs.num_visual, num_keep=self.num_keep)
        return Selection(kept_K, scores_N, settled(inputs))
