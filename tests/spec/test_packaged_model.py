"""The packaged model really sees: through exported bundles it answers held-out questions, and less so without its picture."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bundles import export
from tests.calibration.question_files import drawn_questions
from tests.schedules import schedule_for
from trio_edge.calibration.evaluate.answering import Outcome, answer
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
QUESTIONS = 96
FLOOR = 0.85
REDUCED_FLOOR = 0.5
"""Far above guessing; the README's table has the numbers."""


@pytest.fixture(scope="module")
def keep_all() -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export("tiny", dtype="float32")) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reduced() -> Iterator[Pipeline]:
    schedule = schedule_for(1 / 9, num_layers=16, num_visual=192)
    with Pipeline.from_bundle(export("tiny", dtype="float32", schedule=schedule)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    options = ("--count", str(QUESTIONS), "--seed", "1")
    return read_questions(drawn_questions(tmp_path_factory.mktemp("shapes"), *options))


def outcomes(pipeline: Pipeline, questions: list[Sample]) -> list[Outcome]:
    return [answer(pipeline, question) for question in questions]


def accuracy(outcomes: list[Outcome]) -> float:
    assert len(outcomes) == QUESTIONS
    return statistics.fmean(outcome.score for outcome in outcomes)


def test_all_tokens_answer_held_out_questions(keep_all: Pipeline, questions: list[Sample]) -> None:
    assert accuracy(outcomes(keep_all, questions)) >= FLOOR


def test_another_picture_does_not_answer_them(keep_all: Pipeline, questions: list[Sample]) -> None:
    others = questions[47:] + questions[:47]
    swapped = [replace(one, images=other.images) for one, other in zip(questions, others)]
    assert accuracy(outcomes(keep_all, swapped)) < 0.45


def test_a_ninth_of_the_tokens_still_sees(reduced: Pipeline, questions: list[Sample]) -> None:
    found = outcomes(reduced, questions)
    assert accuracy(found) >= REDUCED_FLOOR
    shares = [outcome.processed_tokens / outcome.visual_tokens for outcome in found]
    assert statistics.fmean(shares) < 0.125  # pictures with fewer tokens than 192 keep a larger share


def test_the_demo_pictures_are_answered(keep_all: Pipeline) -> None:
    folder = ROOT / "examples" / "pictures"
    for entry in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        assert keep_all.generate(folder / entry["file"], entry["question"]).text == entry["answer"]


def test_a_typical_picture_has_at_least_190_visual_tokens(reduced: Pipeline) -> None:
    answer = reduced.generate(
        ROOT / "examples" / "pictures" / "shapes-96x96.png", "what color is the circle ?"
    )
    _ = answer.text
    assert answer.statistics.visual_tokens >= 190
    assert reduced.manifest.dimensions.num_layers >= 12
