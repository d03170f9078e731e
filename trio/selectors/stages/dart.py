"""DART (arXiv 2502.11494): drops tokens that are similar to a few pivots, whatever their importance.

    pivots  = the 4 visual tokens, and the 4 text rows after the last visual token, whose key in layer l - 1 has the
              largest L1 norm (after RoPE, all heads concatenated)
    for each pivot, visual ones in reading order, then those of the text:
        take from the pool the t tokens that are least similar to it, by the cosine of final_norm(x_l)
    kept    = visual pivots and all tokens taken, in reading order;   t = ceil((K - 4) / 8)

One stage, before layer 2 (counted from 0); position ids are kept ("preserved").

Differences from the original, and choices that it leaves open:
- Exactly K tokens are kept. 8 t may exceed K - 4, so the last pivots take fewer.
- The original visits pivots in the order of a Python set; here it is the order above.
- With fewer than 4 text rows after the image, t = ceil((K - 4) / (4 + rows)).
- With K < 4 only the K visual tokens of the largest norm are kept.
- Of equal norms or similarities the lower index comes first. Equal tokens may get similarities that differ in the last
  bit, because a matrix product rounds.
- Keys of grouped-query attention are not repeated: that would only multiply all norms by one number.

The method has no score. ``scores_N`` is 1 at visual pivots, (1 - cosine) / 2 at a token that a pivot took, with the
cosine to that pivot, and 0 elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trio_edge.trio.cost.selections import NUM_DART_PIVOTS as NUM_PIVOTS
from trio_edge.trio.decoder_layers import rms_norm
from trio_edge.trio.selectors import interface
from trio_edge.trio.selectors.stages import row_attention


class Dart(interface.KeepingModule):
    """DART's selection; a ``StageSelector``."""

    def __init__(self, layer: Any, final_norm: Any, *, num_keep: int) -> None:
        """Hold decoder layer l - 1 and the decoder's final norm; raise ScheduleError if K is below 1."""
        super().__init__(num_keep=num_keep)
        self.layer = layer
        self.final_norm = final_norm
        self.num_visual_pivots = min(NUM_PIVOTS, num_keep)

    @classmethod
    def for_stage(cls, parts: interface.StageParts) -> Dart:
        """Return the selector of a stage, which reads the keys of layer l - 1."""
        return cls(parts.previous_layer, parts.final_norm, num_keep=parts.num_keep)

    def forward(self, inputs: interface.StageInputs) -> interface.Selection:
        """Return the visual pivots and the tokens least similar to all pivots; raise ScheduleError if N < K."""
        interface.check_num_keep(self.num_keep, inputs.visual_rows_N.shape[0])
        visual_N, real_N = row_attention.visual_rows(inputs), row_attention.real_tokens(inputs)
        text = row_attention.text_after(inputs)
        norm_S = self._key_norms(inputs)
        pivot_V = interface.best_tokens(
            norm_S.index_select(0, visual_N), inputs.num_visual, num_keep=self.num_visual_pivots
        )
        text_pivot_X = _text_pivots(norm_S, text)
        unit_SD = self._unit_rows(inputs)
        pivot_rows_P = torch.cat([visual_N.index_select(0, pivot_V), text_pivot_X])
        cosine_PN = torch.matmul(unit_SD.index_select(0, pivot_rows_P), unit_SD.index_select(0, visual_N).T)
        index_N = torch.arange(inputs.visual_rows_N.shape[0], device=visual_N.device)
        is_pivot_N = real_N & (index_N[:, None] == pivot_V[None, :]).any(1)
        taken_N, distance_N = self._take(cosine_PN, real_N & ~is_pivot_N, text.num_text)
        chosen_N = is_pivot_N | taken_N
        group_N = 2.0 - chosen_N.to(torch.float32) - real_N.to(torch.float32)
        scores_N = torch.where(is_pivot_N, 1.0, torch.where(taken_N, distance_N, 0.0))
        scores_N = torch.where(real_N, scores_N, -1.0)
        kept_K = interface.indices_by_group(group_N, num_keep=self.num_keep)
        return interface.Selection(kept_K, scores_N, row_attention.settled(inputs))

    def _key_norms(self, inputs: interface.StageInputs) -> Float[Tensor, "S"]:
        assert inputs.previous_SD is not None, "reads_previous"
        normed_SD = row_attention.normed_rows(self.layer, inputs.previous_SD, inputs.length)
        key_SGE = row_attention.rotated_keys(self.layer, normed_SD, inputs.cos_SE, inputs.sin_SE)
        return key_SGE.abs().sum((1, 2))

    def _unit_rows(self, inputs: interface.StageInputs) -> Float[Tensor, "S D"]:
        normed_SD = rms_norm(row_attention.real_rows(inputs.hidden_SD, inputs.length), self.final_norm)
        square_S1 = (normed_SD * normed_SD).sum(-1, keepdim=True)
        return normed_SD * torch.rsqrt(torch.where(square_S1 > 0, square_S1, 1.0))

    def _take(
        self, cosine_PN: Tensor, pool_N: Tensor, num_text: Tensor
    ) -> tuple[Bool[Tensor, "N"], Float[Tensor, "N"]]:
        """Return whether a pivot takes each token, and the token's distance from that pivot."""
        missing = self.num_keep - self.num_visual_pivots
        if not missing:
            return torch.zeros_like(pool_N), torch.zeros_like(cosine_PN[0])
        shares = [-(-missing // (self.num_visual_pivots + rows)) for rows in range(NUM_PIVOTS + 1)]
        num_text_pivots = num_text.clamp(max=NUM_PIVOTS)
        share_1 = torch.zeros(1)
        for rows, share in enumerate(shares):  # not a table: constants have no values while a graph is traced
            share_1 = torch.where(num_text_pivots == rows, float(share), share_1)
        left_1 = torch.full((1,), float(missing))
        taken_N, distance_N = torch.zeros_like(pool_N), torch.zeros_like(cosine_PN[0])
        for pivot in range(self.num_visual_pivots + NUM_PIVOTS):
            quota_1 = torch.minimum(share_1, left_1)
            if pivot >= self.num_visual_pivots:
                quota_1 = torch.where(pivot - self.num_visual_pivots < num_text_pivots, quota_1, 0.0)
            now_N = pool_N & (interface.ranks(-cosine_PN[pivot], pool_N) < quota_1)
            distance_N = torch.where(now_N, (0.5 - 0.5 * cosine_PN[pivot]).clamp(0.0, 1.0), distance_N)
            taken_N, pool_N = taken_N | now_N, pool_N & ~now_N
            left_1 = left_1 - quota_1
        return taken_N, distance_N


def _text_pivots(norm_S: Tensor, text: row_attention.TextRows) -> Int[Tensor, "4"]:
    """Return the text rows of the largest norm, ascending; if there are fewer than 4, the last row fills up."""
    chosen_T = text.real_T & (interface.ranks(norm_S.index_select(0, text.rows_T), text.real_T) < NUM_PIVOTS)
    last_row = norm_S.shape[0] - 1
    rows_T = torch.where(chosen_T, text.rows_T, last_row).to(torch.float32)
    rows_T = torch.cat([rows_T, torch.ones(NUM_PIVOTS) * last_row])  # TopK needs at least 4
    return torch.topk(rows_T, NUM_PIVOTS, largest=False, sorted=True).values.to(torch.int64)
