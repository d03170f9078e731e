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

from trio_edge.trio.selectors.stages.row_attention import MostAttended


class PyramidDrop(MostAttended):
    """PyramidDrop's selection, by the attention of layer l."""

    reads_previous = False
