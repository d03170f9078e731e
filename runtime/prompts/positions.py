"""Position ids of a prompt: plain counting, or with M-RoPE the time, row and column of visual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class PromptPositions(NamedTuple):
    """Positions of all rows of a prefill, and of the first new token."""

    ids: NDArray[np.int32]
    """[A, S]; padding rows have arbitrary positions."""
    next: int
    """Position of the first new token, on every axis."""


def plain_positions(*, num_rows: int, length: int) -> PromptPositions:
    """Return 0, 1, 2, … [1, num_rows] for a prompt of ``length`` real rows."""
    return PromptPositions(np.arange(num_rows, dtype=np.int32)[None], length)


class RunPositions(NamedTuple):
    """M-RoPE positions of one run of visual tokens, counted from the start of the run."""

    ids: NDArray[np.int32]
    """[3, M]: time, row and column of each token."""
    span: int
    """Positions from the run's start to the next token, which need not be its number of tokens."""
    text_before: int
    """Text tokens of the prompt before the run."""


def mrope_positions(runs: Sequence[RunPositions], *, num_text: int, num_rows: int) -> PromptPositions:
    """Return the M-RoPE positions [3, num_rows] of ``num_text`` text tokens and the ``runs`` of visual tokens, with padding.

    Text counts up equally on all axes. The positions of a run's tokens are offset by the start of the run.
    Source: Qwen2_5_VLModel.get_rope_index of transformers 5.23.
    """
    ids = np.zeros((3, num_rows), np.int32)  # padding rows are masked, so any position will do
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
