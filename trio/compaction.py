"""The sequence after a selection: which old row each new row is.

    before: [text | N visual rows | text | padding]      S rows,          ``length`` of them real
    after:  [text | K visual rows | text | padding]      S - N + K rows

Letters: S rows before, N visual rows before, K kept.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def compact_rows(
    kept_K: Int[Tensor, "K"],
    visual_start: Int[Tensor, "*one"],
    num_visual: Int[Tensor, "*one"],
    length: Int[Tensor, "*one"],
    *,
    padded_length: Any,
    max_visual: Any,
) -> tuple[Int[Tensor, "rows"], Int[Tensor, "1"]]:
    """Return the row of the old sequence that each row of the reduced one is, and the reduced real length.

    With fewer visual tokens than K all of them stay and the text after follows directly; the rows saved
    become padding.

    Args:
        kept_K: Kept tokens, int64, ascending indices into the visual span; the first min(K, num_visual) are
            real.
        visual_start: First row of the visual span, 0-d or [1].
        num_visual: Real visual tokens, 0-d or [1], at most ``max_visual``.
        length: Real rows of the old sequence, 0-d or [1].
        padded_length: S, rows of the old sequence with padding; an int, or torch.SymInt under export.
        max_visual: N, visual rows that the old sequence has room for; may be symbolic too.

    Returns:
        Rows in [0, S), int64 of S - N + K entries (those of padding point at any row in range), and the new
        real length, int64.
    """
    num_keep = kept_K.shape[0]
    start, visual, length = (value.to(torch.int64).reshape(1) for value in (visual_start, num_visual, length))
    num_kept = visual.clamp(max=num_keep)
    row_S = torch.arange(padded_length - max_visual + num_keep, device=kept_K.device)
    in_span_S = row_S - start
    visual_S = start + kept_K.index_select(0, in_span_S.clamp(0, num_keep - 1))
    after_S = row_S - num_kept + visual
    moved_S = torch.where(in_span_S < 0, row_S, torch.where(in_span_S < num_kept, visual_S, after_S))
    return moved_S.clamp(0, padded_length - 1), length - visual + num_kept
