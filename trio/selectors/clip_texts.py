"""A question in CLIP's space, for selectors that compare it with the picture's patches there.

A text's first token is CLIP's start mark, its end mark stands for the whole text, and what lies between are its words. Rows
behind the end, and texts behind the last real one, are padding and may hold anything.
Letters: M texts, L tokens of a text, P width of the space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trio_edge.trio.selectors.candidates import unit_rows

if TYPE_CHECKING:
    from trio_edge.trio.selection import ClipInputs


class ClipTexts(NamedTuple):
    """All texts of a question."""

    unit_MLP: Tensor
    """[M, L, P] at length 1; 0 at padding."""
    is_word_ML: Tensor
    """[M, L] bool."""
    is_end_ML: Tensor
    """[M, L] bool, the rows that stand for their texts."""
    is_real_M: Tensor
    """[M] bool."""


def clip_texts(clip: ClipInputs) -> ClipTexts:
    """Return the question's texts at length 1, and what each row is."""
    M, L, _ = clip.texts_MLP.shape
    place_L = torch.arange(L, device=clip.texts_MLP.device)
    is_real_M = torch.arange(M, device=clip.texts_MLP.device) < clip.num_texts.reshape(1)
    ends_M1, is_real_M1 = clip.ends_M[:, None], is_real_M[:, None]
    used_ML = (place_L <= ends_M1) & is_real_M1
    unit_RP = unit_rows(clip.texts_MLP.flatten(0, 1), used_ML.flatten())
    return ClipTexts(
        unit_MLP=unit_RP.reshape(clip.texts_MLP.shape),
        is_word_ML=(place_L > 0) & (place_L < ends_M1) & is_real_M1,
        is_end_ML=(place_L == ends_M1) & is_real_M1,
        is_real_M=is_real_M,
    )
