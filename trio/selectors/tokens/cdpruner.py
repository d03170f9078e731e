"""CDPruner: a determinantal point process of relevance and diversity, solved greedily.

Source: arXiv 2506.10967.

    L_ij = r_i cos(x_i, x_j) r_j,      the next token is the one with the largest gain in det L of the chosen ones

With Cholesky rows c_s of the steps so far and d²_i = L_ii − Σ_s c_si², step t takes j = argmax d², then

    c_ti = (L_ji − Σ_{s<t} c_sj c_si) / d_j,      d²_i ← d²_i − c_ti²

x are the visual tokens after the projector. r is the relevance, the mean over text tokens of cos(x_i, text), scaled
to 0..1 by (r − min + 1e-6) / (max − min) over the image.

With ``clip``, the paper's form for LLaVA, the cosine is taken in CLIP's space: between each token's patch, after CLIP's
last norm and visual projection, and the end tokens of the question's texts. It is negated, since CLIP's patches score
inversely. Without ``clip`` both sides are in the decoder's embedding space, for models without a CLIP text tower. There
we take the cosine as it is, as OpenVINO GenAI does; EADP's port for Qwen negates it.

Differences from the original:
- A question longer than CLIP's texts becomes several whole texts, each with start and end; the original cuts the marked
  tokens into runs of 77, of which only the last has an end.
- The whole image is one pool; the original gives every crop of LLaVA-NeXT the same share.
- Newlines are kept only if the image has fewer than K tokens; the original drops them.
- If all tokens are equally relevant, as without text, r = 1 instead of a division by zero.
- A token that the chosen ones explain up to 1e-4 counts as explained, since float32 resolves no more. Such tokens follow
  by relevance; the original takes the square root of rounding errors.

The K steps read K N numbers each, in float32.
Letters: N visual tokens (padded), K kept, D hidden size, T text tokens, M texts of CLIP, Z width of its space.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs
from trio_edge.trio.selectors.tokens import candidates
from trio_edge.trio.selectors.tokens.greedy import State, greedy_selection, row_at

_FLOOR = 1e-6
_EXPLAINED = 1e-4


class CdPruner(KeepingModule):
    """CDPruner with relevance in the decoder's embedding space or in CLIP's; no parameters."""

    def __init__(self, *, num_keep: int, clip: bool = False) -> None:
        """Fix K, and whether text and image are compared in CLIP's space; raise ScheduleError if K is below 1."""
        super().__init__(num_keep=num_keep)
        self.clip = clip

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores give the order of choice, K for the first token."""
        real_N = candidates.real_tokens(inputs, num_keep=self.num_keep)
        shown_N = candidates.shown_tokens(inputs, num_keep=self.num_keep)
        unit_ND = candidates.unit_rows(inputs.tokens_ND, shown_N)
        cosine_N = self._cosine(inputs, unit_ND, shown_N)
        relevance_N = candidates.scaled_to_one((-1 if self.clip else 1) * cosine_N, shown_N, floor=_FLOOR)
        scaled_ND = relevance_N[:, None] * unit_ND
        return _most_determinant(scaled_ND, relevance_N, shown_N, real_N, num_keep=self.num_keep)

    def _cosine(
        self, inputs: TokenInputs, unit_ND: Float[Tensor, "N D"], shown_N: Bool[Tensor, "N"]
    ) -> Float[Tensor, "N"]:
        """Return each token's mean cosine with the text."""
        if inputs.clip is None or not self.clip:
            text_D = mean_text(
                candidates.given(inputs.text_TD, "text_TD"), candidates.given(inputs.num_text, "num_text")
            )
            return (unit_ND * text_D.to(unit_ND.dtype)).sum(-1)
        texts = candidates.clip_texts(inputs.clip)
        whole_Z = torch.where(texts.is_end_ML[..., None], texts.unit_MLZ, 0.0).sum((0, 1))
        mean_Z = whole_Z / texts.is_real_M.to(whole_Z.dtype).sum().clamp(min=1.0)
        return (candidates.unit_rows(inputs.clip.patches_NZ, shown_N) * mean_Z).sum(-1)


def mean_text(text_TD: Float[Tensor, "T D"], num_text: Tensor) -> Float[Tensor, "D"]:
    """Return the mean of the text's unit rows, 0 without text; its dot product with a unit row is the mean cosine."""
    T = text_TD.shape[0]
    used_T = torch.arange(T, device=text_TD.device) < num_text.reshape(1)
    unit_TD = candidates.unit_rows(text_TD, used_T)
    return unit_TD.sum(0) / num_text.clamp(min=1).to(unit_TD.dtype)


def _most_determinant(
    scaled_ND: Float[Tensor, "N D"],
    relevance_N: Float[Tensor, "N"],
    shown_N: Bool[Tensor, "N"],
    real_N: Bool[Tensor, "N"],
    *,
    num_keep: int,
) -> Selection:
    kernel_NN = scaled_ND @ scaled_ND.T
    diagonal_N = (scaled_ND * scaled_ND).sum(-1)
    step_K1 = torch.arange(num_keep, device=kernel_NN.device).to(torch.float32)[:, None]
    explained_N = relevance_N - 3.0  # below every d², in the order of relevance, which is below 2

    rows_KN = torch.zeros_like(kernel_NN[:1]).expand(num_keep, -1).clone()
    return greedy_selection(
        shown_N,
        real_N,
        num_keep=num_keep,
        state=(diagonal_N, rows_KN),
        constants=(kernel_NN, diagonal_N.clone(), explained_N, step_K1),
        gain=lambda state, fixed: torch.where(state[0] > 0, state[0], fixed[2]),
        update=_explain,
    )


def _explain(state: State, constants: State, best: Tensor, number: Tensor) -> State:
    (square_N, rows_KN), (kernel_NN, diagonal_N, _, step_K1) = state, constants
    square = square_N.index_select(0, best)
    usable = square > 0
    rest_N = row_at(kernel_NN, best) - (rows_KN.index_select(1, best) * rows_KN).sum(0)
    row_N = torch.where(usable, rest_N / torch.where(usable, square, 1.0).sqrt(), 0.0)
    left_N = square_N - row_N * row_N
    left_N = torch.where(left_N > _EXPLAINED * diagonal_N, left_N, 0.0)
    return left_N, torch.where(step_K1 == number, row_N[None, :], rows_KN)
