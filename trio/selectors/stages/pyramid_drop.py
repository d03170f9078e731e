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

from typing import TYPE_CHECKING

from trio_edge.trio.selectors.stages.row_attention import MostAttended

if TYPE_CHECKING:
    from trio_edge.trio.selectors.interface import Selection, StageInputs, StageParts


class PyramidDrop(MostAttended):
    """PyramidDrop's selection; a ``StageSelector``."""

    @classmethod
    def for_stage(cls, parts: StageParts) -> PyramidDrop:
        """Return the selector of a stage, which reads the attention of layer l."""
        return cls(parts.layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens with the most attention of the last real row in layer l; raise ScheduleError if N < K."""
        return self.selection(inputs.hidden_SD, inputs)
