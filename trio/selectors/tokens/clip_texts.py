"""A question in CLIP's space, for selectors that compare it with the image's patches.

A text is CLIP's start token, its words, and the end token, which stands for the whole text. Padding rows may hold anything;
a text without an end token is padding.
Letters: M texts, L tokens per text, Z width of the space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trio_edge.runtime.bundle.graph_io import END, WORD
from trio_edge.trio.selectors.tokens.candidates import unit_rows

if TYPE_CHECKING:
    from trio_edge.trio.selectors.interface import ClipInputs


class UnitTexts(NamedTuple):
    """All texts of a question."""

    unit_MLZ: Tensor
    """[M, L, Z], words and end tokens scaled to length 1; 0 elsewhere."""
    is_word_ML: Tensor
    """[M, L] bool."""
    is_end_ML: Tensor
    """[M, L] bool, rows that stand for their texts."""
    is_real_M: Tensor
    """[M] bool."""


def clip_texts(clip: ClipInputs) -> UnitTexts:
    """Return the question's texts with rows of length 1, and the kind of each row."""
    is_end_ML = clip.marks_ML == END
    unit_RZ = unit_rows(clip.texts_MLZ.flatten(0, 1), (clip.marks_ML > 0).flatten())
    return UnitTexts(
        unit_MLZ=unit_RZ.reshape(clip.texts_MLZ.shape),
        is_word_ML=clip.marks_ML == WORD,
        is_end_ML=is_end_ML,
        is_real_M=is_end_ML.to(torch.float32).sum(-1) > 0,
    )
