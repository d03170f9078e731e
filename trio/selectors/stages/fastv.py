"""FastV (arXiv 2403.06764): keeps the visual tokens with the most attention of the last prompt row in layer l - 1.

    score_i = mean over heads of softmax(q_last · k / √E)_i        in layer l - 1, which has just run
    kept    = the K largest, in reading order

One stage, before layer 2 (counted from 0); position ids are kept ("preserved").

Differences from the original: the row is computed again from the input of layer l - 1, so that the layer may run with any
attention kernel; the numbers are the same. Of equal scores the lower index comes first (there: TopK's choice). K is fixed
instead of round((1 - R) N) of each image. Selection runs once, in the prefill, as in the original's variant with a KV
cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.trio.selectors.stages.row_attention import MostAttended

if TYPE_CHECKING:
    from trio_edge.trio.selectors.interface import Selection, StageInputs, StageParts


class FastV(MostAttended):
    """FastV's selection; a ``StageSelector``."""

    @classmethod
    def for_stage(cls, parts: StageParts) -> FastV:
        """Return the selector of a stage, which reads the attention of layer l - 1."""
        return cls(parts.previous_layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the tokens with the most attention of the last real row in layer l - 1; raise ScheduleError if N < K."""
        assert inputs.previous_SD is not None, "reads_previous"
        return self.selection(inputs.previous_SD, inputs)
