"""EADP: covers the image with the tokens kept, weighted by each token's relevance to the text (facility location).

Source: arXiv 2607.02484. Its form for Qwen reads the text as the decoder's input embeddings; its form for LLaVA (``clip``)
compares text and patches in the space of the CLIP model that LLaVA's tower comes from.

    c_li = −cos(text_l, x_i)                 for every text token l; all cosines are negated, as in the original
    global_i = −cos(mean of the text's embeddings, x_i); with CLIP the embedding of the text's end token
    h_l = entropy of softmax_i(100 c_li)     only the max(1, ⌊q L⌋) text tokens l of the lowest entropy count
    dense_i = Σ_l softmax_l(−h_l / 0.01) c_li
    m = minmax(α global + (1 − α) dense),    smoothed by a 3 × 3 Gaussian (σ 1, edges mirrored) where the tokens are a grid
    gain_i = Σ_j m_j^β max(0, s_ij − max over taken t of s_tj),    s = (1 + cos(x_i, x_j)) / 2

With CLIP, x_i in c and global is the token's patch after CLIP's last norm and visual projection; s still compares tokens
after the projector. A question longer than CLIP's texts is several texts, whose α global + (1 − α) dense are averaged.

q = 0.2 (the original's code; the paper's best is 0.3), α = 0.5 (the paper's; the original's scripts for LLaVA
set 1, which ignores single tokens), β = 2, or 1 with CLIP.

Differences from the original:
- Of CLIP's texts only words count one by one; the original's code also takes start, end and padding, its paper all but
  the end.
- A long question becomes several whole texts, each with start and end; the original cuts it into runs of 77 tokens.
- The whole image is one pool, the original's "joint" mode, its only one with an exact budget.
- Newlines are kept only if the image has fewer than K tokens; the original drops them. With newlines, or with tokens in
  several grids, there is no smoothing.
- Without text, or if all tokens are equally relevant, every token has the weight 1.

The K steps read N² numbers each, which takes nearly all of the selector's time, as the paper finds, too.
Letters: N visual tokens (padded), K kept, D hidden size, T text tokens, M texts of L tokens, Z width of CLIP's space.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs, ranks
from trio_edge.trio.selectors.tokens import candidates
from trio_edge.trio.selectors.tokens.greedy import cover

_TEXT_SHARE = 0.2  # q
_GLOBAL_SHARE = 0.5  # α
_SHARPNESS = 100.0
_ENTROPY_SCALE = 0.01
_NEVER = -1e6  # softmax input of excluded tokens; finite, so that its product with a probability of 0 is 0


class Eadp(KeepingModule):
    """EADP with relevance in the decoder's embedding space or in CLIP's; no parameters."""

    def __init__(self, *, num_keep: int, grid: tuple[int, int] | None = None, clip: bool = False) -> None:
        """Fix the shape of the selection.

        Args:
            num_keep: K.
            grid: Rows and columns if the N tokens are one full grid; None for no smoothing.
            clip: Whether text and image are compared in CLIP's space.

        Raises:
            ScheduleError: If K is below 1, or the grid too small.
        """
        super().__init__(num_keep=num_keep)
        if grid is not None and min(grid) < 2:
            raise ScheduleError(f"grid: expected at least 2 x 2, got {grid}; leave it out")
        self.grid = grid
        self.clip = clip

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores give the order of choice, K for the first token."""
        real_N = candidates.real_tokens(inputs, num_keep=self.num_keep)
        shown_N = candidates.shown_tokens(inputs, num_keep=self.num_keep)
        unit_ND = candidates.unit_rows(inputs.tokens_ND, shown_N)
        importance_N = self._importance(inputs, unit_ND, shown_N)
        similarity_NN = importance_N[None, :] * (1.0 + unit_ND @ unit_ND.T) * 0.5
        return cover(similarity_NN, torch.ones_like(importance_N), shown_N, real_N, num_keep=self.num_keep)

    def _importance(
        self, inputs: TokenInputs, unit_ND: Float[Tensor, "N D"], shown_N: Bool[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        texts = _in_clip(inputs, shown_N) if self.clip else _in_embeddings(inputs, unit_ND)
        dense_MN = self._dense(texts, shown_N)
        fused_MN = _GLOBAL_SHARE * texts.whole_MN + (1.0 - _GLOBAL_SHARE) * dense_MN
        used_M1 = texts.is_real_M[:, None].to(fused_MN.dtype)
        fused_N = (used_M1 * fused_MN).sum(0) / used_M1.sum().clamp(min=1.0)
        importance_N = candidates.scaled_to_one(fused_N, shown_N, floor=0.0)
        if self.grid is not None:
            importance_N = torch.where(shown_N, _smoothed(importance_N, self.grid), 0.0)
        return importance_N ** (1.0 if self.clip else 2.0)

    def _dense(self, texts: _Cosines, shown_N: Bool[Tensor, "N"]) -> Float[Tensor, "M N"]:
        log_MLN = torch.log_softmax(torch.where(shown_N, _SHARPNESS * texts.words_MLN, _NEVER), dim=-1)
        entropy_ML = -(log_MLN.exp() * log_MLN).sum(-1)
        num_M1 = texts.is_word_ML.to(torch.float32).sum(-1, keepdim=True)
        # 0.2 is not exact in binary: without the addend ⌊0.2 · 5⌋ could be 0.
        count_M1 = torch.floor(_TEXT_SHARE * num_M1 + 1e-4).clamp(min=1.0)
        counted_ML = texts.is_word_ML & (ranks(-entropy_ML, texts.is_word_ML) < count_M1)
        sharpened_ML = torch.where(counted_ML, -entropy_ML / _ENTROPY_SCALE, _NEVER)
        weight_ML = torch.where(counted_ML, torch.softmax(sharpened_ML, dim=-1), 0.0)
        return (weight_ML[..., None] * texts.words_MLN).sum(1)


class _Cosines(NamedTuple):
    """Negated cosines of the text with each token."""

    words_MLN: Tensor
    whole_MN: Tensor
    is_word_ML: Tensor
    is_real_M: Tensor


def _in_embeddings(inputs: TokenInputs, unit_ND: Float[Tensor, "N D"]) -> _Cosines:
    """Return the cosines in the decoder's embedding space, where the question is one text and its mean the whole."""
    text_TD, num_text = (
        candidates.given(inputs.text_TD, "text_TD"),
        candidates.given(inputs.num_text, "num_text"),
    )
    used_T = torch.arange(text_TD.shape[0], device=text_TD.device) < num_text.reshape(1)
    sum_1D = candidates.masked(text_TD, used_T).sum(0, keepdim=True)  # has the direction of the mean
    whole_1D = candidates.unit_rows(sum_1D, torch.ones_like(used_T[:1])).to(unit_ND.dtype)
    words_TD = candidates.unit_rows(text_TD, used_T).to(unit_ND.dtype)
    return _Cosines(
        words_MLN=-(words_TD @ unit_ND.T)[None],
        whole_MN=-(whole_1D * unit_ND).sum(-1)[None],
        is_word_ML=used_T[None],
        is_real_M=torch.ones_like(used_T[:1]),
    )


def _in_clip(inputs: TokenInputs, shown_N: Bool[Tensor, "N"]) -> _Cosines:
    """Return the cosines in CLIP's space, where a text's end token stands for the whole."""
    assert inputs.clip is not None, "--clip"
    texts = candidates.clip_texts(inputs.clip)
    unit_NZ = candidates.unit_rows(inputs.clip.patches_NZ, shown_N)
    cosine_MLN = -(texts.unit_MLZ.to(unit_NZ.dtype) @ unit_NZ.T)
    return _Cosines(
        words_MLN=cosine_MLN,
        whole_MN=torch.where(texts.is_end_ML[..., None], cosine_MLN, 0.0).sum(1),
        is_word_ML=texts.is_word_ML,
        is_real_M=texts.is_real_M,
    )


def _smoothed(values_N: Float[Tensor, "N"], grid: tuple[int, int]) -> Float[Tensor, "N"]:
    middle = 1.0 / (1.0 + 2.0 * math.exp(-0.5))
    side = (1.0 - middle) / 2.0
    values_YX = values_N.reshape(grid)
    for axis, size in enumerate(grid):
        place = torch.arange(size, device=values_N.device)
        before, after = (place - 1).abs(), size - 1 - (size - 2 - place).abs()
        sides_YX = values_YX.index_select(axis, before) + values_YX.index_select(axis, after)
        values_YX = middle * values_YX + side * sides_YX
    return values_YX.reshape(-1)
