"""Helpers of the selectors before the decoder: candidate tokens, rows made ready for comparison, questions in CLIP's space.

Padding may hold anything, even NaN, so it is replaced before any arithmetic. The working type is float32, or float64 for
float64 inputs. A text of CLIP is its start token, its words, and the end token, which stands for the whole text; a text
without an end token is padding.
Letters: N visual tokens, M texts, L tokens per text, Z width of CLIP's space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trio_edge.runtime.bundle.graph_io import END, WORD
from trio_edge.trio.selectors import interface


def real_tokens(inputs: interface.TokenInputs, *, num_keep: int) -> Bool[Tensor, "N"]:
    """Return whether each token is real, that is, no padding.

    Raises:
        ScheduleError: If there are fewer rows than ``num_keep``.
    """
    N = inputs.tokens_ND.shape[0]
    interface.check_num_keep(num_keep, N)
    return torch.arange(N, device=inputs.tokens_ND.device) < inputs.num_visual.reshape(1)


def shown_tokens(inputs: interface.TokenInputs, *, num_keep: int) -> Bool[Tensor, "N"]:
    """Return whether each token shows a part of the image: neither padding nor newlines."""
    real_N = real_tokens(inputs, num_keep=num_keep)
    return real_N if inputs.is_newline_N is None else real_N & ~inputs.is_newline_N.to(torch.bool)


def given(value: Tensor | None, name: str) -> Tensor:
    """Return ``value``; the caller always fills the inputs that a selector needs."""
    if value is None:
        raise AssertionError(f"{name}: expected a tensor, as the selector needs it, got none")
    return value


def masked(values: Tensor, usable: Tensor, *, fill: float = 0.0) -> Tensor:
    """Return ``values`` in the working type, with ``fill`` where ``usable`` (the leading axis) is False."""
    usable = usable.reshape(-1, *[1] * (values.ndim - 1))
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return torch.where(usable, values.to(dtype), fill)


def unit_rows(rows_XD: Float[Tensor, "X D"], usable_X: Bool[Tensor, "X"]) -> Float[Tensor, "X D"]:
    """Return the rows scaled to length 1 in the working type; zero and unusable rows are 0, so similar to nothing."""
    rows_XD = masked(rows_XD, usable_X)
    # Scaled by the largest entry first, so that squares neither overflow nor vanish.
    largest_X1 = rows_XD.abs().amax(-1, keepdim=True)
    scaled_XD = rows_XD / torch.where(largest_X1 > 0, largest_X1, 1.0)
    square_X1 = (scaled_XD * scaled_XD).sum(-1, keepdim=True)
    return scaled_XD / torch.where(square_X1 > 0, square_X1, 1.0).sqrt()


def scaled_to_one(
    values_N: Float[Tensor, "N"], usable_N: Bool[Tensor, "N"], *, floor: float
) -> Float[Tensor, "N"]:
    """Return ``(x − min + floor) / (max − min)`` of the usable values, or 1 if all are equal; 0 at unusable ones."""
    largest = torch.finfo(values_N.dtype).max
    low = torch.where(usable_N, values_N, largest).amin(0)
    span = torch.where(usable_N, values_N, -largest).amax(0) - low
    # Rounding differences count as equal, so that equal relevance does not become a random order.
    equal = span <= 16 * torch.finfo(torch.float32).eps
    scaled_N = torch.where(equal, 1.0, (values_N - low + floor) / torch.where(equal, 1.0, span))
    return torch.where(usable_N, scaled_N, 0.0)


def selection_of(
    chosen_N: Bool[Tensor, "N"], scores_N: Float[Tensor, "N"], real_N: Bool[Tensor, "N"], *, num_keep: int
) -> interface.Selection:
    """Return a selection of exactly ``num_keep`` tokens: the chosen ones, then the first other real ones, then padding.

    At most ``num_keep`` tokens may be chosen.
    """
    group_N = 2.0 - chosen_N.to(torch.float32) - real_N.to(torch.float32)
    return exact_selection(
        interface.ascending(interface.indices_by_group(group_N, num_keep=num_keep)), scores_N, real_N
    )


def exact_selection(
    kept_K: Tensor, scores_N: Tensor, real_N: Tensor, weights_KN: Tensor | None = None
) -> interface.Selection:
    """Return the selection of ``kept_K``, with scores of -1 at padding; it takes no rounds, so ``unsettled`` is 0."""
    scores_N = torch.where(real_N, scores_N.to(torch.float32), -1.0)
    return interface.Selection(
        kept_K, scores_N, torch.zeros(1, dtype=torch.int32, device=real_N.device), weights_KN
    )


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


def clip_texts(clip: interface.ClipInputs) -> UnitTexts:
    """Return the question's texts with rows of length 1, and the kind of each row."""
    is_end_ML = clip.marks_ML == END
    unit_RZ = unit_rows(clip.texts_MLZ.flatten(0, 1), (clip.marks_ML > 0).flatten())
    return UnitTexts(
        unit_MLZ=unit_RZ.reshape(clip.texts_MLZ.shape),
        is_word_ML=clip.marks_ML == WORD,
        is_end_ML=is_end_ML,
        is_real_M=is_end_ML.to(torch.float32).sum(-1) > 0,
    )
