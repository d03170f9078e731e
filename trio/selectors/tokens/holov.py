"""HoloV: gives every part of the image a share of the budget by its attention and variety.

Source: arXiv 2510.02912.

The tokens in reading order are cut into P contiguous chunks. With S the cosine inside a chunk, its diagonal 0:

    score_i = 1000 a_i + 0.09 λ var_j(S_ij),      λ = mean|1000 a| / mean|var| over the chunk
    w_chunk = mean score of the chunk / sum of these means;      quota = ⌊w K⌋, the rest one each to the largest w

A chunk keeps its ``quota`` tokens of the largest attention a (class row, mean over heads). x are the tokens after the
projector. P = 16 (36 tokens each of 576; the original's port for Qwen takes ⌊1024 / 576 · N / K⌋).

Differences from the original:
- Token o of the n real ones is in chunk ⌊o P / n⌋.
- What a chunk smaller than its quota leaves goes to the best scores of the whole image; the original adds zero vectors.
- Tokens stay in the image's order; the original sorts them by score.
- Newlines are kept only if the image has fewer than K tokens; the original drops them.
- Weights and scores are compared in steps of 2⁻¹⁷ of the largest one: ties are common, and rounding would decide them.

Quotas are masks over ranks, so no shape depends on the data.
Letters: N visual tokens (padded), K kept, P chunks, D hidden size.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trio_edge.trio.selectors import interface
from trio_edge.trio.selectors.tokens import candidates

_NUM_CHUNKS = 16
_ATTENTION = 1000.0
_VARIETY = 0.09


class HoloV(interface.KeepingModule):
    """HoloV; no parameters."""

    def forward(self, inputs: interface.TokenInputs) -> interface.Selection:
        """Return the selection; scores combine the tokens' attention and variety."""
        real_N = candidates.real_tokens(inputs, num_keep=self.num_keep)
        shown_N = candidates.shown_tokens(inputs, num_keep=self.num_keep)
        attention_N = candidates.masked(candidates.given(inputs.attention_N, "attention_N"), shown_N)
        unit_ND = candidates.unit_rows(inputs.tokens_ND, shown_N)
        attention_N = attention_N.to(unit_ND.dtype)
        chunk_N = _chunks(shown_N)
        chunk_P = torch.arange(_NUM_CHUNKS, device=chunk_N.device).to(torch.float32)
        member_PN = ((chunk_P[:, None] == chunk_N[None, :]) & shown_N).to(unit_ND.dtype)
        same_NN = (chunk_N[:, None] == chunk_N[None, :]) & shown_N[:, None] & shown_N[None, :]
        score_N = _scores(attention_N, _variance(unit_ND, same_NN), member_PN)
        quota_P = _quotas(score_N, member_PN, num_keep=self.num_keep)
        quota_N = (member_PN * quota_P[:, None]).sum(0)
        index_N = torch.arange(shown_N.shape[0], device=shown_N.device)
        rank_N = (interface.comes_before(attention_N, index_N) & same_NN).to(torch.float32).sum(0)
        count = shown_N.shape[0]
        group_N = count * torch.where(rank_N < quota_N, 0.0, 1.0)
        # Newlines come after the image, padding after newlines.
        after_N = count * torch.where(real_N, 2.0, 3.0) + index_N.to(torch.float32)
        order_N = torch.where(shown_N, group_N + interface.ranks(_coarse(score_N), shown_N), after_N)
        kept_K = interface.ascending(torch.topk(order_N, self.num_keep, largest=False).indices)
        return candidates.exact_selection(kept_K, score_N, real_N)


def _chunks(shown_N: Bool[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Return the chunk of each shown token; values of others are undefined."""
    shown = shown_N.to(torch.float32)
    place_N = torch.cumsum(shown, dim=0) - shown
    # The added half keeps the quotient away from integers, so an inexact division cannot fall below one.
    return torch.floor((place_N * _NUM_CHUNKS + 0.5) / shown.sum(0, keepdim=True).clamp(min=1.0))


def _variance(unit_ND: Float[Tensor, "N D"], same_NN: Bool[Tensor, "N N"]) -> Float[Tensor, "N"]:
    """Return the variance of each token's cosines inside its chunk, with 0 for the cosine with itself."""
    index_N = torch.arange(unit_ND.shape[0], device=unit_ND.device)
    used_NN = same_NN.to(unit_ND.dtype)
    cosine_NN = torch.where(same_NN & (index_N[:, None] != index_N[None, :]), unit_ND @ unit_ND.T, 0.0)
    size_N1 = used_NN.sum(-1, keepdim=True).clamp(min=1.0)
    off_NN = (cosine_NN - cosine_NN.sum(-1, keepdim=True) / size_N1) * used_NN
    return (off_NN * off_NN).sum(-1) / size_N1[:, 0]


def _scores(
    attention_N: Float[Tensor, "N"], variance_N: Float[Tensor, "N"], member_PN: Float[Tensor, "P N"]
) -> Float[Tensor, "N"]:
    level_P = (member_PN * attention_N.abs()).sum(-1) * _ATTENTION
    variety_P = (member_PN * variance_N).sum(-1)
    scale_P = torch.where(variety_P > 0, level_P / torch.where(variety_P > 0, variety_P, 1.0), 0.0)
    return _ATTENTION * attention_N + _VARIETY * (member_PN * scale_P[:, None]).sum(0) * variance_N


def _coarse(values_X: Float[Tensor, "X"]) -> Float[Tensor, "X"]:
    """Return the values in steps of 2⁻¹⁷ of the largest, so that weights which differ by rounding are equal."""
    largest = values_X.abs().amax(0)
    return torch.round(values_X / torch.where(largest > 0, largest, 1.0) * 2.0**17)


def _quotas(
    score_N: Float[Tensor, "N"], member_PN: Float[Tensor, "P N"], *, num_keep: int
) -> Float[Tensor, "P"]:
    size_P = member_PN.sum(-1)
    used_P = size_P > 0
    mean_P = (member_PN * score_N).sum(-1) / size_P.clamp(min=1.0)
    total = mean_P.sum(0)
    mean_P = torch.where(total > 0, mean_P, used_P.to(mean_P.dtype))
    weight_P = mean_P / mean_P.sum(0).clamp(min=torch.finfo(mean_P.dtype).tiny)
    # The addend keeps rounding from making 3 of a share of 4.
    quota_P = torch.floor(weight_P * num_keep + 1e-4)
    rest = num_keep - quota_P.sum(0)
    return quota_P + (used_P & (interface.ranks(_coarse(weight_P), used_P) < rest)).to(quota_P.dtype)
