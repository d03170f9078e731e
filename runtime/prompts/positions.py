"""Position ids of a prompt: plain counting, or M-RoPE's time, row and column for the image's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PromptPositions(NamedTuple):
    """Positions of all rows of a prefill, and where the answer goes on."""

    ids: NDArray[np.int32]
    """[A, S]; those of padding rows mean nothing."""
    next: int
    """Position of the first new token, on every axis."""


def plain_positions(*, num_rows: int, length: int) -> PromptPositions:
    """Return 0, 1, 2, … [1, num_rows] for a prompt of ``length`` real rows."""
    return PromptPositions(np.arange(num_rows, dtype=np.int32)[None], length)


def mrope_positions(
    image_3N: NDArray[np.int32], *, image_span: int, num_before: int, num_after: int, num_rows: int
) -> PromptPositions:
    """Return M-RoPE positions [3, num_rows] of text, image, text.

    Text counts up on all axes alike. The image's tokens are offset by where it starts, and the text after it
    goes on ``image_span`` later, however many tokens the image has.
    Source: Qwen2_5_VLModel.get_rope_index of transformers 5.23.

    Args:
        image_3N: Time, row and column of each visual token, from 0.
        image_span: Positions that the image takes; 0 without one.
        num_before: Text tokens before the image.
        num_after: Text tokens after it.
        num_rows: S, with padding.
    """
    ids = np.zeros((3, num_rows), np.int32)  # padding rows are masked: any position will do
    ids[:, :num_before] = np.arange(num_before)
    first_after = num_before + image_3N.shape[1]
    ids[:, num_before:first_after] = num_before + image_3N
    after = num_before + image_span
    ids[:, first_after : first_after + num_after] = after + np.arange(num_after)
    return PromptPositions(ids, after + num_after)
