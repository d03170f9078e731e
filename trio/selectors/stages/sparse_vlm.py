"""SparseVLM (arXiv 2410.04417, ICML version): keeps tokens that the question's relevant words attend to, merges others.

    raters  : once, from the embeddings that enter layer 0, V of visual tokens and T of the text after the image:
              p = mean over visual tokens of softmax over text of V Tᵀ;  raters = text tokens with p above the mean
    score_i = mean over raters and heads of the attention to visual token i in layer l - 1, which has just run
    kept    = the k tokens of the largest score, unchanged
    merged  = of the r = N - k others, the n = int(0.3 r) + 1 of the largest score, in int(n / 10) + 1 clusters; the plain
              mean of each cluster comes after the kept tokens

Clusters are density peaks of x_l, with c clusters and dist = ‖x - y‖ / √D:

    density = exp(-mean of dist² to the c nearest tokens, itself included)
    centres = the c tokens with the largest density × distance to the nearest denser token (for the densest: × the largest
              distance of all); every other token belongs to its nearest centre

Three stages, before layers 3, 7 and 16 of 32: layers 2, 6 and 15 score, with all tokens of their stage. Position ids are
renumbered ("compact").

The split of the K rows: the published tables fix k (for example 66, 30 and 17, which give 82, 32 and 18 rows); here K is
the number of rows. With f(r) = int((int(0.3 r) + 1) / 10) + 1 clusters and V real visual tokens, k + f(r) = K and
r = V - k give r - f(r) = V - K. The smallest solution is r = int((100 (V - K) + 10) / 97) + 1, so f(r) = r - (V - K). It
reproduces the published tables. V is the image's own count: fewer tokens than N make fewer clusters.

Differences from the original:
- Fixed K for each stage, as in the paper. The authors' video branch lets the rank of the attention choose the ratio of each
  layer; a K that is known only after a stage would make the host wait there, so levels choose the budget instead.
- At most K // 2 rows are merged, which no published budget reaches; K = 1 is plain top-k.
- No random noise in the densities. Of equal scores, densities or distances the lower index comes first.
- Densities are compared as logarithms, so they do not vanish; distances below float32's rounding error are 0.
- Merged rows are in the order of their centres.
- A rater's probability must exceed the mean by 1e-4 of it, so that rounding decides nothing. If no text token does (one
  token, or all alike), all are raters. Without text after the image all scores are 0.
- Products of embeddings are float32, whatever the model's type.
- The text ends with the prompt; the original assumes the length of its own prompt.
- Version 2 (14 heads, no merging, attention divided by that of equal rows) is not implemented.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trio_edge.trio.cost.selections import split_of
from trio_edge.trio.selectors import interface
from trio_edge.trio.selectors.stages import row_attention

_ABOVE_MEAN = 1e-4
_SAME_POINT = 1e-5
"""Squared distances below this share of the squared lengths are rounding errors of float32."""


class SparseVlm(interface.KeepingModule):
    """SparseVLM's selection; a ``StageSelector``."""

    def __init__(self, layer: Any, *, num_keep: int) -> None:
        """Hold decoder layer l - 1; raise ScheduleError if K is below 1. K counts merged rows, too."""
        super().__init__(num_keep=num_keep)
        self.attention = row_attention.RowAttention(layer)

    @classmethod
    def for_stage(cls, parts: interface.StageParts) -> SparseVlm:
        """Return the selector of a stage, which scores with layer l - 1."""
        return cls(parts.previous_layer, num_keep=parts.num_keep)

    def forward(self, inputs: interface.StageInputs) -> interface.Selection:
        """Return the tokens that the raters attend to most in layer l - 1, and clusters of some others.

        Raises:
            ScheduleError: If N < K.
        """
        N = inputs.visual_rows_N.shape[0]
        interface.check_num_keep(self.num_keep, N)
        scores_N = self._scores(inputs)
        if self.num_keep == 1 or (isinstance(N, int) and self.num_keep == N):
            kept_K = interface.best_tokens(scores_N, inputs.num_visual, num_keep=self.num_keep)
            return interface.Selection(kept_K, scores_N, row_attention.settled(inputs))
        kept_K, weights_KN = self._merge(inputs, scores_N)
        return interface.Selection(kept_K, scores_N, row_attention.settled(inputs), weights_KN)

    def _scores(self, inputs: interface.StageInputs) -> Float[Tensor, "N"]:
        assert inputs.previous_SD is not None, "reads_previous"
        text = row_attention.text_after(inputs)
        rater_T = rater_weights(inputs)
        attention_TS = self.attention(
            inputs.previous_SD,
            inputs.cos_SE,
            inputs.sin_SE,
            text.rows_T,
            inputs.length,
            inputs.position_S,
        ).mean(1)
        scores_S = torch.matmul(rater_T[None].to(attention_TS.dtype), attention_TS)[0]
        return row_attention.at_visual_tokens(scores_S, inputs)

    def _merge(self, inputs: interface.StageInputs, scores_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return kept indices [K] and the rows' weights [K, N]."""
        N, real_N = scores_N.shape[0], row_attention.real_tokens(inputs)
        index_N = torch.arange(N, device=scores_N.device)
        split = _split(inputs.num_visual.reshape(1).to(torch.float32), self.num_keep)
        rank_N = interface.ranks(scores_N, real_N)
        kept_N = real_N & (rank_N < split.num_kept)
        pooled_N = real_N & ~kept_N & (rank_N < split.num_kept + split.num_pooled)
        max_pooled, max_merged = N, self.num_keep // 2
        if isinstance(N, int):  # with a symbolic N all tokens are in the pool, most of them masked
            _, max_merged, max_pooled = split_of(N, self.num_keep)
        pool_P = index_N
        if isinstance(max_pooled, int):
            pool_P = interface.indices_by_group(1.0 - pooled_N.to(torch.float32), num_keep=max_pooled)
        real_P = pooled_N.index_select(0, pool_P)
        hidden_SD = row_attention.real_rows(inputs.hidden_SD, inputs.length)
        pool_PD = hidden_SD.index_select(0, row_attention.visual_rows(inputs).index_select(0, pool_P))
        centre_P, owner_P = density_peaks(pool_PD, real_P, split.num_merged, max_clusters=max_merged)
        owner_P = pool_P.index_select(0, owner_P).to(torch.float32)
        place_NP = ((index_N[:, None] == pool_P[None, :]) & real_P[None, :]).to(torch.float32)
        owner_N = torch.where(pooled_N, (place_NP * owner_P).sum(1), index_N.to(torch.float32))
        is_centre_N = (place_NP * centre_P.to(torch.float32)).sum(1) > 0
        group_N = torch.where(kept_N, 0.0, torch.where(is_centre_N, 1.0, torch.where(real_N, 2.0, 3.0)))
        kept_K = interface.indices_by_group(group_N, num_keep=self.num_keep)
        member_KN = (owner_N[None, :] == kept_K[:, None].to(torch.float32)).to(torch.float32)
        return kept_K, member_KN / member_KN.sum(1, keepdim=True)


class _Split(NamedTuple):
    """Numbers of kept tokens, clusters and clustered tokens; integers as float32 [1]."""

    num_kept: Tensor
    num_merged: Tensor
    num_pooled: Tensor


def _split(num_visual: Float[Tensor, "1"], num_keep: int) -> _Split:
    """Return ``split_of``, computed in the graph; the added half keeps quotients away from integers."""
    excess = num_visual - num_keep
    merged = torch.floor((100.0 * excess + 10.5) / 97.0) + 1.0 - excess
    merged = torch.where(excess > 0, merged.clamp(max=float(num_keep // 2)), 0.0)
    removed = num_visual - (num_keep - merged)
    pooled = torch.where(excess > 0, torch.floor((3.0 * removed + 0.5) / 10.0) + 1.0, 0.0)
    return _Split(num_keep - merged, merged, pooled)


def rater_weights(inputs: interface.StageInputs) -> Float[Tensor, "T"]:
    """Return 1 / number of raters at each rater among the text after the image, 0 elsewhere; float32."""
    assert inputs.prompt is not None, "reads_prompt"
    embeds_FD = row_attention.real_rows(inputs.prompt.embeds_FD, inputs.prompt.length)
    text = row_attention.text_after(inputs)
    visual_F = (inputs.prompt.is_visual_F > 0).to(embeds_FD.dtype)
    index_T = torch.arange(text.rows_T.shape[0], device=embeds_FD.device)
    first = inputs.prompt.length.to(torch.int64).reshape(1) - text.num_text  # no selection drops text
    rows_T = (first + index_T).clamp(0, embeds_FD.shape[0] - 1)
    logits_FT = torch.matmul(embeds_FD, embeds_FD.index_select(0, rows_T).T)
    logits_FT = torch.where(text.real_T[None], logits_FT, torch.finfo(logits_FT.dtype).min)
    relevance_T = torch.matmul(visual_F[None], torch.softmax(logits_FT, dim=-1))[0]
    relevance_T = torch.where(text.real_T, relevance_T / visual_F.sum(0, keepdim=True).clamp(min=1.0), 0.0)
    above_T = text.real_T & (relevance_T * text.num_text > 1.0 + _ABOVE_MEAN)
    above_T = above_T | (text.real_T & ~above_T.any(0, keepdim=True))
    rater_T = above_T.to(torch.float32)
    return rater_T / rater_T.sum(0, keepdim=True).clamp(min=1.0)


def density_peaks(
    points_PD: Float[Tensor, "P D"], real_P: Tensor, num_clusters: Float[Tensor, "1"], *, max_clusters: int
) -> tuple[Tensor, Tensor]:
    """Return whether each point is a centre, bool [P], and each point's centre, int64 [P].

    Results are undefined where ``real_P`` is False. ``num_clusters`` is at most the number of real points and
    ``max_clusters``, which is at most P.
    """
    index_P = torch.arange(points_PD.shape[0], device=points_PD.device)
    real_PP = real_P[:, None] & real_P[None, :]
    square_PP = _squared_distances(points_PD)
    far = torch.finfo(square_PP.dtype).max
    nearest_PC = torch.topk(
        torch.where(real_P[None, :], square_PP, far), max_clusters, largest=False, sorted=True
    ).values
    counts_C = torch.arange(max_clusters, device=points_PD.device) < num_clusters
    spread_P = torch.where(counts_C[None], nearest_PC, 0.0).sum(1) / num_clusters.clamp(min=1.0)
    denser_PP = interface.comes_before(-spread_P, index_P) & real_PP
    largest = torch.where(real_PP, square_PP, 0.0).amax((0, 1))
    gap_P = torch.where(denser_PP, square_PP, largest).amin(0)
    # log(density · distance); a product of 0 comes last, whatever the density.
    peak_P = torch.where(gap_P > 0, 0.5 * torch.log(torch.where(gap_P > 0, gap_P, 1.0)) - spread_P, -far / 2)
    centre_P = real_P & (interface.ranks(peak_P, real_P) < num_clusters)
    to_centre_PP = torch.where(centre_P[None, :], square_PP, far)
    is_nearest_PP = centre_P[None, :] & (to_centre_PP == to_centre_PP.amin(1, keepdim=True))
    owner_P = torch.where(is_nearest_PP, index_P[None, :].to(torch.float32), float(2**24)).amin(1)
    owner_P = torch.where(real_P & ~centre_P, owner_P, index_P.to(torch.float32))
    return centre_P, owner_P.to(torch.int64)


def _squared_distances(points_PD: Tensor) -> Float[Tensor, "P P"]:
    """Return ‖x - y‖² / D."""
    square_P = (points_PD * points_PD).sum(-1)
    both_PP = square_P[:, None] + square_P[None, :]
    square_PP = both_PP - 2.0 * torch.matmul(points_PD, points_PD.T)
    return torch.where(square_PP > _SAME_POINT * both_PP, square_PP, 0.0) / points_PD.shape[1]
