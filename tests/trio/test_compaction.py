"""Gathering the reduced sequence: text and kept visual rows in the prompt's order, then padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trio_edge.trio.compaction import compact_rows


def _compact(
    kept: list[int],
    visual_rows: list[int],
    *,
    num_visual: int,
    length: int,
    rows: int,
    is_ascending: bool = True,
) -> tuple[list[int], list[int]]:
    """Return the old row of each real row, and the new rows of the real kept tokens."""
    scalars = (torch.tensor([value], dtype=torch.int32) for value in (num_visual, length))
    compacted = compact_rows(
        torch.tensor(kept),
        torch.tensor(visual_rows, dtype=torch.int32),
        *scalars,
        padded_length=rows,
        is_ascending=is_ascending,
    )
    index, num_kept = compacted.rows_R, min(len(kept), num_visual)
    new_length = length - num_visual + num_kept
    assert index.dtype == torch.int64
    assert len(index) == rows - len(visual_rows) + len(kept)
    assert ((index >= 0) & (index < rows)).all()
    assert sorted(compacted.visual_rows_K.tolist()) == compacted.visual_rows_K.tolist()
    assert compacted.is_visual_R.nonzero()[:, 0].tolist() == compacted.visual_rows_K[:num_kept].tolist()
    assert compacted.kept_R[compacted.is_visual_R].tolist() == list(range(num_kept))
    return index[:new_length].tolist(), compacted.visual_rows_K[:num_kept].tolist()


def _run(start: int, count: int) -> list[int]:
    return list(range(start, start + count))


def test_text_stays_and_kept_rows_move_together() -> None:
    index, visual = _compact([1, 4], _run(2, 6), num_visual=6, length=11, rows=13)
    assert index == [0, 1, 3, 6, 8, 9, 10]
    assert visual == [2, 3]


def test_padded_visual_span_gives_its_rows_to_the_text_behind() -> None:
    index, _ = _compact([0, 3], _run(1, 6), num_visual=4, length=8, rows=10)
    assert index == [0, 1, 4, 5, 6, 7]


def test_fewer_visual_tokens_than_kept_all_stay() -> None:
    index, _ = _compact([0, 1, 2, 3], _run(2, 6), num_visual=3, length=7, rows=12)
    assert index == list(range(7))


def test_prompt_without_an_image_is_unchanged() -> None:
    index, _ = _compact([0, 1], _run(3, 6), num_visual=0, length=5, rows=12)
    assert index == list(range(5))


@pytest.mark.parametrize("start", [0, 3])
def test_keeping_all_is_the_identity(start: int) -> None:
    index, visual = _compact(list(range(5)), _run(start, 5), num_visual=5, length=9, rows=11)
    assert (index, visual) == (list(range(9)), _run(start, 5))


def test_text_between_two_images_is_never_dropped() -> None:
    index, visual = _compact([1, 4], [1, 2, 3, 6, 7, 8], num_visual=6, length=10, rows=12)
    assert index == [0, 2, 4, 5, 7, 9]
    assert visual == [1, 4]


def test_a_merged_row_of_the_first_image_stands_after_what_was_kept_of_the_second() -> None:
    index, visual = _compact([0, 3, 1], [1, 2, 6, 7], num_visual=4, length=9, rows=9, is_ascending=False)
    assert index == [0, 1, 3, 4, 5, 7, 2, 8]
    assert visual == [1, 5, 6]


@given(st.data())
def test_any_rows_are_those_of_a_plain_deletion(data: st.DataObject) -> None:
    num_visual, num_text = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 9))
    more_visual, more_text = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    num_rows, length = num_visual + more_visual, num_visual + num_text
    if num_rows == 0:
        return
    places = data.draw(st.permutations(range(length)))
    rows = sorted(places[:num_visual])
    order = data.draw(st.permutations(range(num_visual)))
    num_keep = data.draw(st.integers(1, num_rows))
    kept = sorted(order[:num_keep])
    kept += range(num_visual, num_visual + num_keep - len(kept))
    index, visual = _compact(
        kept,
        rows + [0] * more_visual,
        num_visual=num_visual,
        length=length,
        rows=length + more_visual + more_text,
    )
    dropped = set(rows) - {rows[token] for token in kept if token < num_visual}
    assert index == [row for row in range(length) if row not in dropped]
    assert [index[row] for row in visual] == [rows[token] for token in kept if token < num_visual]
