"""Baselines, and the answers of one opened bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.calibration.question_files import drawn_questions
from trio_edge.calibration.evaluate.answering import BASELINES, answer, baseline
from trio_edge.calibration.questions import read_questions
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("count", "keep"), [(51, 14), (14, 14), (9, 3), (30, 1)])
def test_baselines_keep_k_tokens_in_order(name: str, count: int, keep: int) -> None:
    kept = baseline(name, seed=1, is_base=lambda: np.arange(count) < 9)(
        0, np.arange(count, dtype=np.int32), keep
    )
    assert len(set(kept.tolist())) == keep
    assert kept.tolist() == sorted(kept.tolist())
    assert 0 <= kept.min() <= kept.max() < count


def test_base_tile_first_fills_up_with_others() -> None:
    kept = baseline("base-tile-first", seed=0, is_base=lambda: np.arange(20) < 4)(
        0, np.arange(20, dtype=np.int32), 6
    )
    assert kept[:4].tolist() == [0, 1, 2, 3]
    assert (kept[4:] >= 4).all()


def test_base_tiles_of_all_images_come_first() -> None:
    """Of two images with 10 tokens each, of which 3 are the base tile's, the second stage sees 12."""
    entering = np.array([0, 1, 2, 4, 6, 9, 10, 11, 12, 13, 16, 19], np.int32)
    is_base = np.arange(20) % 10 < 3
    choose = baseline("base-tile-first", seed=0, is_base=lambda: is_base)
    assert choose(1, entering, 6).tolist() == [0, 1, 2, 6, 7, 8]
    assert is_base[entering[choose(1, entering, 4)]].all()
    assert {0, 1, 2, 6, 7, 8} < set(choose(1, entering, 8).tolist())


def test_an_opened_bundle_answers_drawn_questions(reduced_bundle: Path, tmp_path: Path) -> None:
    questions = read_questions(drawn_questions(tmp_path, "--count", "3"))
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        outcomes = [answer(pipeline, question) for question in questions]
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert 0.0 < outcome.processed_tokens / outcome.visual_tokens < 0.6
