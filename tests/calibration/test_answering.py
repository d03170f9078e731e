"""Baselines, and the answers of one opened bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.pictures import random_picture
from trio_edge.calibration.evaluate.answering import Answerer, Asking, Outcome
from trio_edge.calibration.evaluate.baselines import SELECTIONS, baseline, smaller_image
from trio_edge.calibration.questions import synthetic_questions
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.qwen import QwenImages
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

PROCESSING = {
    "llava_next": LlavaImages(
        kind="anyres",
        tile_size=28,
        patch_size=4,
        resize_size=28,
        grid_pinpoints=((28, 56), (56, 28), (56, 56), (28, 84)),
    ),
    "qwen2_5_vl": QwenImages(patch_size=14, window_size=112),
}


@pytest.mark.parametrize("name", SELECTIONS)
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


@pytest.mark.parametrize("share", [1.0, 0.7, 0.3, 0.01])
@pytest.mark.parametrize("family", PROCESSING)
def test_a_smaller_image_has_at_most_its_share_of_tokens(family: str, share: float) -> None:
    image = random_picture(280, 196)
    processing = PROCESSING[family]
    smaller = smaller_image(image, processing, share=share)
    before, after = (processing.sizes(*one.size)["N"] for one in (image, smaller))
    fewest = min(processing.sizes(10 * step, 7 * step)["N"] for step in range(1, 29))
    assert after <= max(share * before, fewest)
    assert abs(smaller.width / smaller.height - 10 / 7) < 0.1 or smaller.height < 20
    assert (share == 1.0) == (smaller is image)


def test_an_opened_bundle_answers_generated_samples(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        answerer = Answerer(Asking(bundle=reduced_bundle), pipeline)
        outcomes = [answerer.answer(question) for question in synthetic_questions(3, seed=0)]
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        assert 0.0 < outcome.processed_tokens / outcome.visual_tokens < 0.6
