"""Baselines, and the answers of one opened bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from trio_edge.calibration.evaluate.running.answering import Answerer, Asking, Outcome, Task
from trio_edge.calibration.evaluate.running.baselines import BASELINES, baseline
from trio_edge.calibration.questions import synthetic_questions
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("count", "keep"), [(51, 14), (14, 14), (9, 3), (30, 1)])
def test_baselines_keep_k_tokens_in_order(name: str, count: int, keep: int) -> None:
    kept = baseline(name, seed=1, base_tokens=9)(0, np.arange(count, dtype=np.int32), keep)
    assert len(set(kept.tolist())) == keep
    assert kept.tolist() == sorted(kept.tolist())
    assert 0 <= kept.min() <= kept.max() < count


def test_base_tile_first_fills_up_with_others() -> None:
    kept = baseline("base-tile-first", seed=0, base_tokens=4)(0, np.arange(20, dtype=np.int32), 6)
    assert kept[:4].tolist() == [0, 1, 2, 3]
    assert (kept[4:] >= 4).all()


def test_an_opened_bundle_answers_generated_samples(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        answerer = Answerer(Asking(bundle=reduced_bundle), pipeline)
        outcomes = [answerer.answer(Task(question)) for question in synthetic_questions(3, seed=0)]
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        assert 0.0 < outcome.processed_tokens / outcome.visual_tokens < 0.6
