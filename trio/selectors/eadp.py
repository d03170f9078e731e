"""EADP: covers the picture, weighted by how much the text asks for each token (facility location).

Source: arXiv 2607.02484, in its form for Qwen: the text is the decoder's input embeddings of the instruction.

    c_li = −cos(text_l, x_i)                 for every text token l; all cosines are negated, as in the original
    global_i = −cos(mean of the text's embeddings, x_i)
    h_l = entropy of softmax_i(100 c_li)     of the tokens l, the max(1, ⌊q L⌋) of the lowest entropy count
    dense_i = Σ_l softmax_l(−h_l / 0.01) c_li
    m = minmax(α global + (1 − α) dense),    smoothed by a 3 × 3 Gaussian (σ 1, edges mirrored) where the tokens are a grid
    gain_i = Σ_j m_j^β max(0, s_ij − max over taken t of s_tj),    s = (1 + cos(x_i, x_j)) / 2

Defaults: q = 0.2 (the original's code; its paper's best is 0.3), α = 0.5, β = 2 (Qwen; 1 for LLaVA).

Where we differ: the form for LLaVA takes the relevance from CLIP's own text encoder and visual projection; it needs a graph
of its own and is left for later: here every family uses the decoder's embedding space. One pool for the whole picture (the
original's "joint" mode, its only one with an exact budget). Newlines take no part (the original drops them) and fill up
only where the picture has fewer than K tokens; with them, or where tokens form more than one grid, there is no smoothing.
Without text, or where all tokens are equally relevant, every token weighs 1.
K steps of N² each: the paper itself finds this to be nearly all of the selector's time.
Letters: N visual tokens (padded), K kept, D hidden size, T text tokens.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trio_edge.runtime.errors import ScheduleError
from trio_edge.trio.selection import Selection, TokenInputs, check_num_keep, ranks
from trio_edge.trio.selectors.candidates import (
    given,
    masked,
    picture_tokens,
    real_tokens,
    scaled_to_one,
    unit_rows,
)
from trio_edge.trio.selectors.greedy import cover

_SHARPNESS = 100.0
_ENTROPY_SCALE = 0.01
_NEVER = -1e6  # of a softmax's input; finite, so that its product with a probability of 0 is 0


class Eadp(nn.Module):
    """EADP with relevance in the decoder's embedding space; no parameters."""

    method = "eadp"
    needs_features = False
    needs_text = True

    def __init__(
        self,
        *,
        num_keep: int,
        text_share: float = 0.2,
        global_share: float = 0.5,
        exponent: float = 2.0,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """Fix the shape of the selection.

        Args:
            num_keep: K.
            text_share: q, the part of the text tokens that counts one by one.
            global_share: α, weight of the text's mean against single tokens.
            exponent: β of the importance.
            grid: Rows and columns if the N tokens are one full grid; None leaves out the smoothing.

        Raises:
            ScheduleError: If a value is out of range.
        """
        super().__init__()
        check_num_keep(num_keep)
        self.num_keep = num_keep
        for name, value in (("text_share", text_share), ("global_share", global_share)):
            if not 0.0 <= value <= 1.0:
                raise ScheduleError(f"{name}: expected 0..1, got {value}; give a fraction")
        if exponent <= 0.0:
            raise ScheduleError(f"exponent: expected > 0, got {exponent}; the paper uses 1 or 2")
        if grid is not None and min(grid) < 2:
            raise ScheduleError(f"grid: expected at least 2 x 2, got {grid}; leave it out")
        self.text_share = text_share
        self.global_share = global_share
        self.exponent = exponent
        self.grid = grid

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores tell the order of choice, K for the first."""
        real_N = real_tokens(inputs, num_keep=self.num_keep)
        shown_N = picture_tokens(inputs, num_keep=self.num_keep)
        unit_ND = unit_rows(inputs.tokens_ND, shown_N)
        importance_N = self._importance(inputs, unit_ND, shown_N)
        similarity_NN = importance_N[None, :] * (1.0 + unit_ND @ unit_ND.T) * 0.5
        return cover(similarity_NN, torch.ones_like(importance_N), shown_N, real_N, num_keep=self.num_keep)

    def _importance(
        self, inputs: TokenInputs, unit_ND: Float[Tensor, "N D"], shown_N: Bool[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        text_TD, num_text = given(inputs.text_TD, "text_TD"), given(inputs.num_text, "num_text")
        used_T = torch.arange(text_TD.shape[0], device=text_TD.device) < num_text.reshape(1)
        sum_1D = masked(text_TD, used_T).sum(0, keepdim=True)  # points where the mean does
        global_N = -(unit_rows(sum_1D, torch.ones_like(used_T[:1])).to(unit_ND.dtype) * unit_ND).sum(-1)
        cosine_TN = -(unit_rows(text_TD, used_T).to(unit_ND.dtype) @ unit_ND.T)
        dense_N = self._dense(cosine_TN, used_T, shown_N, num_text)
        fused_N = self.global_share * global_N + (1.0 - self.global_share) * dense_N
        importance_N = scaled_to_one(fused_N, shown_N, floor=0.0)
        if self.grid is not None:
            importance_N = torch.where(shown_N, _smoothed(importance_N, self.grid), 0.0)
        return importance_N**self.exponent

    def _dense(
        self,
        cosine_TN: Float[Tensor, "T N"],
        used_T: Bool[Tensor, "T"],
        shown_N: Bool[Tensor, "N"],
        num_text: Tensor,
    ) -> Float[Tensor, "N"]:
        log_TN = torch.log_softmax(torch.where(shown_N, _SHARPNESS * cosine_TN, _NEVER), dim=-1)
        entropy_T = -(log_TN.exp() * log_TN).sum(-1)
        # A share of 0.2 has no exact binary form: without the addend ⌊0.2 · 5⌋ could be 0.
        count = torch.floor(self.text_share * num_text.to(torch.float32) + 1e-4).clamp(min=1.0)
        counted_T = used_T & (ranks(-entropy_T, used_T) < count)
        # As one row: TensorRT's softmax takes no vector.
        sharpened_1T = torch.where(counted_T, -entropy_T / _ENTROPY_SCALE, _NEVER)[None, :]
        weight_T = torch.where(counted_T, torch.softmax(sharpened_1T, dim=-1)[0], 0.0)
        return (weight_T[:, None] * cosine_TN).sum(0)


def _smoothed(values_N: Float[Tensor, "N"], grid: tuple[int, int]) -> Float[Tensor, "N"]:
    middle = 1.0 / (1.0 + 2.0 * math.exp(-0.5))
    side = (1.0 - middle) / 2.0
    values_YX = values_N.reshape(grid)
    for axis, size in enumerate(grid):
        before = torch.tensor([1, *range(size - 1)])
        after = torch.tensor([*range(1, size), size - 2])
        sides_YX = values_YX.index_select(axis, before) + values_YX.index_select(axis, after)
        values_YX = middle * values_YX + side * sides_YX
    return values_YX.reshape(-1)
