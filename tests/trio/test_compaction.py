"""Gathering the reduced sequence: text, kept visual rows, text, padding."""

from __future__ import annotations

import pytest
import torch

from trio_edge.trio.compaction import compact_rows


def _compact(
    kept: list[int], *, start: int, num_visual: int, length: int, rows: int, max_visual: int
) -> tuple[list[int], int]:
    scalars = (torch.tensor([value], dtype=torch.int32) for value in (start, num_visual, length))
    index, new_length = compact_rows(torch.tensor(kept), *scalars, padded_length=rows, max_visual=max_visual)
    assert index.dtype == torch.int64
    assert len(index) == rows - max_visual + len(kept)
    assert ((index >= 0) & (index < rows)).all()
    return index.tolist(), int(new_length)


def test_text_stays_and_kept_rows_move_together() -> None:
    index, length = _compact([1, 4], start=2, num_visual=6, length=11, rows=13, max_visual=6)
    assert index[:length] == [0, 1, 3, 6, 8, 9, 10]


def test_padded_visual_span_gives_its_rows_to_the_text_behind() -> None:
    index, length = _compact([0, 3], start=1, num_visual=4, length=8, rows=10, max_visual=6)
    assert index[:length] == [0, 1, 4, 5, 6, 7]


def test_fewer_visual_tokens_than_kept_all_stay() -> None:
    index, length = _compact([0, 1, 2, 3], start=2, num_visual=3, length=7, rows=12, max_visual=6)
    assert index[:length] == list(range(7))


def test_prompt_without_an_image_is_unchanged() -> None:
    index, length = _compact([0, 1], start=3, num_visual=0, length=5, rows=12, max_visual=6)
    assert index[:length] == list(range(5))


@pytest.mark.parametrize("start", [0, 3])
def test_keeping_all_is_the_identity(start: int) -> None:
    index, length = _compact(list(range(5)), start=start, num_visual=5, length=9, rows=11, max_visual=5)
    assert (index[:length], length) == (list(range(9)), 9)
