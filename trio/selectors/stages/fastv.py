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

from trio_edge.trio.selectors.stages.row_attention import MostAttended


class FastV(MostAttended):
    """FastV's selection, by the attention of layer l - 1."""

    reads_previous = True
