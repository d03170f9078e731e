"""VisionZip: keeps the tokens with most of the encoder's attention, and sums of the others for context.

Source: arXiv 2412.04467.

    dominant    the D tokens of the largest attention of the class row (mean over heads, same order as the original's sum)
    targets     the first C of the R others at places 0, t, 2t, … in reading order, with t = max(1, ⌊R / C⌋)
    contextual  x_target + mean of the x that are most similar to this target, by the cosine of the encoder's keys

K = D + C. Default: C = ⌊10 K / 64⌋ (54 + 10, 108 + 20, 162 + 30). As in the original's code, a contextual row is
longer than a token.

Differences from the original:
- It counts the class token's state as one of the D. Here all D are tokens of the image, since the class token never
  reaches the projector: same budget, one patch more.
- It merges before the projector; here the projector's outputs are summed.
- The whole image is one pool; the original gives each crop of LLaVA-NeXT a fifth of the budget.
- Newlines are dropped unless the image has fewer than K tokens. With at most K tokens nothing is merged.

``weights_KN`` is 0 at padding, except in rows that are padding themselves; padding must be finite in the product.
Letters: N visual tokens (padded), K kept, D dominant, C contextual.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors import interface
from trio_edge.trio.selectors.tokens import candidates


class VisionZip(interface.KeepingModule):
    """VisionZip; no parameters."""

    def __init__(self, *, num_keep: int, num_contextual: int | None = None) -> None:
        """Fix the shape of the selection.

        Args:
            num_keep: K.
            num_contextual: C, at least 0 and below K; None for ⌊10 K / 64⌋.

        Raises:
            ScheduleError: If a value is out of range.
        """
        super().__init__(num_keep=num_keep)
        self.num_contextual = num_keep * 10 // 64 if num_contextual is None else num_contextual
        if not 0 <= self.num_contextual < num_keep:
            raise ScheduleError(
                f"num_contextual: expected 0..{num_keep - 1}, got {num_contextual}; keep one dominant token"
            )

    def forward(self, inputs: interface.TokenInputs) -> interface.Selection:
        """Return the selection; scores are the attention. Contextual tokens come last."""
        real_N = candidates.real_tokens(inputs, num_keep=self.num_keep)
        shown_N = candidates.shown_tokens(inputs, num_keep=self.num_keep)
        attention_N = candidates.masked(candidates.given(inputs.attention_N, "attention_N"), shown_N)
        D, C = self.num_keep - self.num_contextual, self.num_contextual
        dominant_N = shown_N & (interface.ranks(attention_N, shown_N) < D)
        rest_N = shown_N & ~dominant_N
        num_rest = rest_N.to(torch.float32).sum(0, keepdim=True)
        target_N = _targets(rest_N, num_rest, num=C)
        merging = num_rest > C
        kept_K = torch.where(
            merging,
            torch.cat([_where(dominant_N, num=D), *([_where(target_N, num=C)] if C else [])]),
            # The whole image fits: it comes first, newlines after it, padding last.
            interface.ascending(
                interface.indices_by_group(
                    2.0 - shown_N.to(torch.float32) - real_N.to(torch.float32), num_keep=self.num_keep
                )
            ),
        )
        weights_KN = None
        if C:
            keys_NE = candidates.unit_rows(candidates.given(inputs.keys_NE, "keys_NE"), shown_N)
            merged_N = rest_N & ~target_N & merging
            weights_KN = self._weights(kept_K, keys_NE, merged_N)
        return candidates.exact_selection(kept_K, attention_N, real_N, weights_KN)

    def _weights(
        self, kept_K: Int[Tensor, "K"], keys_NE: Float[Tensor, "N E"], merged_N: Bool[Tensor, "N"]
    ) -> Float[Tensor, "K N"]:
        C = self.num_contextual
        index_N = torch.arange(keys_NE.shape[0], device=keys_NE.device)
        self_KN = (kept_K[:, None] == index_N[None, :]).to(torch.float32)
        target_C = kept_K[self.num_keep - C :]
        similarity_CN = keys_NE.index_select(0, target_C) @ keys_NE.T
        slot_C1 = torch.arange(C, device=keys_NE.device).to(torch.float32)[:, None]
        is_best_CN = similarity_CN == similarity_CN.amax(0, keepdim=True)
        best_N = torch.where(is_best_CN, slot_C1, float(C)).amin(0, keepdim=True)
        taken_CN = ((best_N == slot_C1) & merged_N[None, :]).to(torch.float32)
        count_C1 = taken_CN.sum(-1, keepdim=True)
        dominant_DN, target_CN = self_KN[: self.num_keep - C], self_KN[self.num_keep - C :]
        return torch.cat([dominant_DN, target_CN + taken_CN / count_C1.clamp(min=1.0)])


def _targets(rest_N: Bool[Tensor, "N"], num_rest: Float[Tensor, "1"], *, num: int) -> Bool[Tensor, "N"]:
    """Return every t-th of the remaining tokens, t = max(1, ⌊R / num⌋), the first ``num`` of them."""
    rest = rest_N.to(torch.float32)
    place_N = torch.cumsum(rest, dim=0) - rest
    # The added half keeps the quotient away from integers, so an inexact division cannot fall below one.
    stride = torch.floor((num_rest + 0.5) / max(num, 1)).clamp(min=1.0)
    slot_N = torch.floor((place_N + 0.5) / stride)
    return rest_N & (slot_N * stride == place_N) & (slot_N < num)


def _where(chosen_N: Bool[Tensor, "N"], *, num: int) -> Int[Tensor, "X"]:
    """Return the indices of the ``num`` chosen tokens, ascending."""
    return interface.indices_by_group(torch.where(chosen_N, 0.0, 1.0), num_keep=num)
