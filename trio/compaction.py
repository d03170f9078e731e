"""Row arithmetic of a reduced sequence: [text | kept visual tokens | text | padding] from [text | visual | text | padding]."""

from __future__ import annotations

import torch
from jaxtyping import Int, Int64
from torch import Tensor


def compact_rows(
    kept_K: Int64[Tensor, " K"],
    visual_start: Int[Tensor, "..."],
    num_visual: Int[Tensor, "..."],
    length: Int[Tensor, "..."],
    *,
    padded_length: int,
    max_visual: int,
) -> tuple[Int64[Tensor, " R"], Int64[Tensor, " 1"]]:
    """Return for each row of the reduced sequence the row it comes from, and the new real length.

    Args:
        kept_K: Kept tokens, ascending, of which the first min(K, num_visual) are real.
        visual_start: First visual row.
        num_visual: Real visual tokens.
        length: Real rows.
        padded_length: S; the result has R = S - N + K rows.
        max_visual: N.

    Returns:
        Rows in [0, S), int64, padding rows pointing anywhere; and ``length`` less what was dropped.
    """
    start, count = visual_start.reshape(1).long(), num_visual.reshape(1).long()
    K = kept_K.shape[0]
    kept = count.clamp(max=K)
    row_R = torch.arange(padded_length - max_visual + K)
    visual_R = start + kept_K.index_select(0, (row_R - start).clamp(min=0, max=K - 1))
    after_R = (row_R + (count - kept)).clamp(max=padded_length - 1)
    rows_R = torch.where(row_R < start, row_R, torch.where(row_R < start + kept, visual_R, after_R))
    return rows_R.clamp(max=padded_length - 1), length.reshape(1).long() - (count - kept)
