"""Position ids of a prompt: plain counting, or M-RoPE's time, row and column for the tokens of images and videos."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

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


class RunPositions(NamedTuple):
    """M-RoPE positions of one run of visual tokens, counted from where the run starts."""

    ids: NDArray[np.int32]
    """[3, M]: time, row and column of each token."""
    span: int
    """Positions from the run's start to what follows it, however many tokens it has."""
    text_before: int
    """Text tokens of the prompt before the run."""


def mrope_positions(runs: Sequence[RunPositions], *, num_text: int, num_rows: int) -> PromptPositions:
    """Return M-RoPE positions [3, num_rows] of text and runs of visual tokens, in the prompt's order.

    Text counts up on all axes alike. A run's tokens are offset by where it starts.
    Source: Qwen2_5_VLModel.get_rope_index of transformers 5.23.

    Args:
        runs: In order; none without an image.
        num_text: Text tokens of the prompt.
        num_rows: S, with padding.
    """
    ids = np.zeros((3, num_rows), np.int32)  # padding rows are masked: any position will do
    row = text = position = 0
    for run in (*runs, RunPositions(np.empty((3, 0), np.int32), 0, num_text)):
        count = run.text_before - text
        ids[:, row : row + count] = position + np.arange(count)
        row, text, position = row + count, run.text_before, position + count
        stop = row + run.ids.shape[1]
        ids[:, row:stop] = position + run.ids
        row, position = stop, position + run.span
    # The time of a long video can be larger than the positions of the text after it.
    return PromptPositions(ids, max(position, int(ids[:, :row].max(initial=-1)) + 1))
