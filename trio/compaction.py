"""The sequence after a selection: the old row that each new row comes from.

    before: text and N visual rows in the prompt's order, then padding      S rows, ``length`` of them real
    after:  the same without the dropped visual rows                        S - N + K rows

Text rows are never dropped, and the order stays.
Letters: S rows before, N visual rows before, K kept, R rows after, T = S - N text rows with their padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class CompactedRows(NamedTuple):
    """The rows of the reduced sequence."""

    rows_R: Tensor
    """[R] int64, the old row of each new row; any row in [0, S) at padding."""
    kept_R: Tensor
    """[R] int64, the place of each visual row in the selection, 0..K-1; any place at text."""
    is_visual_R: Tensor
    """[R] bool, whether a row is a kept visual token."""
    visual_rows_K: Tensor
    """[K] int64, the new row of each kept token; padding comes after all real rows."""

    def gathered(
        self, rows_SD: Tensor, weights_KN: Tensor | None, visual_rows_N: Tensor, num_visual: Tensor
    ) -> Tensor:
        """Return the kept ones of ``rows_SD``, [R, D]; with weights, visual rows are weighted sums of tokens."""
        kept_RD = rows_SD.index_select(0, self.rows_R)
        if weights_KN is None:
            return kept_RD
        visual_ND = rows_SD.index_select(0, visual_rows_N).to(torch.float32)
        real_N = torch.arange(visual_ND.shape[0]) < num_visual
        merged_KD = torch.matmul(weights_KN, torch.where(real_N[:, None], visual_ND, 0.0)).to(kept_RD.dtype)
        is_merged_K = (weights_KN > 0).to(torch.float32).sum(-1) > 1.0
        # only rows of several tokens: a product with a single 1 may round if TensorRT uses TF32
        takes_R = self.is_visual_R & is_merged_K.index_select(0, self.kept_R)
        return torch.where(takes_R[:, None], merged_KD.index_select(0, self.kept_R), kept_RD)


def compact_rows(
    kept_K: Int[Tensor, "K"],
    visual_rows_N: Int[Tensor, "N"],
    num_visual: Int[Tensor, "*one"],
    length: Int[Tensor, "*one"],
    *,
    padded_length: Any,
    is_ascending: bool = True,
) -> CompactedRows:
    """Return the rows of the sequence without the dropped visual tokens.

    If there are fewer visual tokens than K, all of them stay and the other rows become padding.

    Args:
        kept_K: Kept tokens, int64, indices into ``visual_rows_N``; the first min(K, num_visual) are real.
        visual_rows_N: Row of each visual token, ascending; any row at padding.
        num_visual: Real visual tokens, 0-d or [1], at most N.
        length: Real rows of the old sequence, 0-d or [1].
        padded_length: S, an int, or torch.SymInt under export.
        is_ascending: Whether ``kept_K`` is ascending. If not (rows that merge several tokens come last), a token after a
            later one in the selection also comes after it in the sequence.
    """
    num_keep, max_visual = kept_K.shape[0], visual_rows_N.shape[0]
    visual, length = (value.to(torch.int64).reshape(1) for value in (num_visual, length))
    index_N = torch.arange(max_visual, device=kept_K.device)
    index_K = torch.arange(num_keep, device=kept_K.device)
    # A kept token's new row is its place in the selection plus the number of text rows before it.
    text_before_N = visual_rows_N.to(torch.int64) - index_N
    text_before_K = text_before_N.index_select(0, kept_K)
    if not is_ascending:
        text_before_K = torch.where(index_K[None, :] <= index_K[:, None], text_before_K[None, :], 0).amax(1)
    visual_rows_K = index_K + torch.where(index_K < visual, text_before_K, length - visual)

    row_R = torch.arange(padded_length - max_visual + num_keep, device=kept_K.device)
    kept_R = _count(visual_rows_K[None, :] < row_R[:, None])
    text_R = (row_R - kept_R).clamp(0, padded_length - max_visual - 1)
    kept_R = kept_R.clamp(0, num_keep - 1)
    is_visual_R = visual_rows_K.index_select(0, kept_R) == row_R
    # A text row's old row is its number among text rows plus the number of visual rows before it.
    text_T = torch.arange(padded_length - max_visual, device=kept_K.device)
    is_before_TN = (text_before_N[None, :] <= text_T[:, None]) & (index_N < visual)[None, :]
    text_rows_T = text_T + _count(is_before_TN)
    rows_R = torch.where(
        is_visual_R,
        visual_rows_N.to(torch.int64).index_select(0, kept_K.index_select(0, kept_R)),
        text_rows_T.index_select(0, text_R),
    )
    is_real_R = is_visual_R & (kept_R < visual)
    return CompactedRows(rows_R.clamp(0, padded_length - 1), kept_R, is_real_R, visual_rows_K)


def _count(is_counted: Tensor) -> Tensor:
    """Return the number of true entries on the last axis, int64; the float32 sum is exact and every backend has it."""
    return is_counted.to(torch.float32).sum(-1).to(torch.int64)
