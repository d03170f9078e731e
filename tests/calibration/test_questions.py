"""Files of questions: fields, one line for everything that can be wrong, and digests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.calibration.question_files import write_questions
from trio_edge.calibration.metrics import METRICS, check_metric
from trio_edge.calibration.questions import (
    digest_of,
    read_questions,
)
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

LINE: dict[str, Any] = {"image": "p0.png", "question": "what ?", "answer": "w1"}


def test_fields_of_a_line(tmp_path: Path) -> None:
    line = {**LINE, "answers": ["a", 2], "choices": ["x", "y"], "id": 7, "kind": "k", "more": None}
    (question,) = read_questions(write_questions(tmp_path, [line]), suffix="Be short.")
    assert question.images == (tmp_path / "p0.png",)
    assert question.question == "what ?\nA. x\nB. y\nBe short."
    assert (question.answers, question.choices) == (("a", "2"), ("x", "y"))
    assert (question.sample_id, question.kind) == ("7", "k")
    assert question.where == f"{tmp_path / 'questions.jsonl'}:1"


def test_a_line_may_have_several_images(tmp_path: Path) -> None:
    rest = {"question": "what ?", "answer": "w1"}
    names = (["p0.png", "p1.png"], ["p1.png", "p0.png"], ["p0.png"])
    lines = [{"images": list(name), **rest} for name in names]
    questions = read_questions(write_questions(tmp_path, [*lines, LINE]))
    assert [question.images for question in questions[:3]] == [
        tuple(tmp_path / name for name in some) for some in names
    ]
    assert len({question.image_id for question in questions[:3]}) == 3
    assert questions[2].image_id == questions[3].image_id


def test_blank_lines_count_for_the_line_number_only(tmp_path: Path) -> None:
    path = write_questions(tmp_path, [LINE])
    path.write_text("\n\n" + json.dumps(LINE) + "\r\n\n", encoding="utf-8")
    (question,) = read_questions(path)
    assert (question.index, question.sample_id) == (0, "3")


def test_a_split_takes_its_lines_only(tmp_path: Path) -> None:
    lines = [{**LINE, "split": name, "id": name} for name in ("random", "popular", "random")]
    questions = read_questions(write_questions(tmp_path, lines), split="random")
    assert [(question.index, question.sample_id) for question in questions] == [(0, "random"), (1, "random")]


def test_a_count_stops_before_later_lines(tmp_path: Path) -> None:
    path = write_questions(tmp_path, [LINE, LINE])
    path.write_text(path.read_text() + "{", encoding="utf-8")
    assert len(read_questions(path, count=2)) == 2


BAD_LINES: dict[str, tuple[str, str]] = {
    "not_json": ("{", "expected one JSON object"),
    "a_list": ("[]", "expected one JSON object"),
    "deep": ("[" * 100_000, "expected one JSON object"),
    "no_image": ('{"question": "q", "answer": "a"}', "text 'image'"),
    "image_and_images": (
        '{"image": "p0.png", "images": ["p1.png"], "question": "q", "answer": "a"}',
        "'image' or 'images', got both",
    ),
    "images_empty": (
        '{"images": [], "question": "q", "answer": "a"}',
        "one text or more in the list 'images'",
    ),
    "images_is_a_text": (
        '{"images": "p0.png", "question": "q", "answer": "a"}',
        "list 'images', got 'p0.png'",
    ),
    "images_hold_a_number": ('{"images": ["p0.png", 1], "question": "q", "answer": "a"}', "list 'images'"),
    "one_of_the_images_missing": (
        '{"images": ["p0.png", "no.png"], "question": "q", "answer": "a"}',
        "no.png",
    ),
    "image_is_a_number": ('{"image": 1, "question": "q", "answer": "a"}', "text 'image'"),
    "no_question": ('{"image": "p0.png", "answer": "a"}', "text 'question'"),
    "no_answer": ('{"image": "p0.png", "question": "q"}', "expected 'answer'"),
    "answers_empty": ('{"image": "p0.png", "question": "q", "answers": []}', "expected 'answer'"),
    "answers_no_list": ('{"image": "p0.png", "question": "q", "answers": "a"}', "expected 'answer'"),
    "answer_is_a_truth_value": ('{"image": "p0.png", "question": "q", "answer": true}', "expected 'answer'"),
    "choices_no_list": ('{"image": "p0.png", "question": "q", "answer": "a", "choices": "ab"}', "'choices'"),
    "image_missing": ('{"image": "no.png", "question": "q", "answer": "a"}', "no.png"),
    "image_is_a_folder": ('{"image": ".", "question": "q", "answer": "a"}', "Is a directory"),
    "image_is_text": ('{"image": "questions.jsonl", "question": "q", "answer": "a"}', "no known format"),
    "image_name_with_a_null": ('{"image": "a\\u0000b", "question": "q", "answer": "a"}', "image"),
}


@pytest.mark.parametrize("name", list(BAD_LINES))
def test_a_bad_line_is_named(name: str, tmp_path: Path) -> None:
    line, expected = BAD_LINES[name]
    path = write_questions(tmp_path, [LINE])
    path.write_text(json.dumps(LINE) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"questions\.jsonl:2: ") as caught:
        read_questions(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "at least one question"), (b"\n \n", "at least one question"), (b"\xff\xfe{", "JSON-lines file")],
    ids=["empty", "blank", "not_utf8"],
)
def test_a_file_without_questions_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read_questions(path)


def test_a_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of split 'val', got none"):
        read_questions(write_questions(tmp_path, [LINE]), split="val")


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("vqa", "expected 10 answers"), ("yes-no", "yes or no"), ("choice", "2..26 choices")],
)
def test_a_metric_that_does_not_fit_names_the_line(metric: str, expected: str, tmp_path: Path) -> None:
    questions = read_questions(write_questions(tmp_path, [LINE]))
    with pytest.raises(DataError, match=r"questions\.jsonl:1: .*" + expected):
        check_metric(questions, METRICS[metric])


def test_the_digest_depends_on_what_is_asked_and_how_it_is_scored(tmp_path: Path) -> None:
    digests = set()
    for change in (
        {},
        {"question": "other ?"},
        {"answer": "w2"},
        {"image": "p1.png"},
        {"id": "x"},
        {"images": ["p0.png"] * 2},
    ):
        line = {**LINE, **change}
        if "images" in line:
            del line["image"]
        questions = read_questions(write_questions(tmp_path, [line]))
        digests |= {digest_of(questions, metric="exact"), digest_of(questions, metric="vqa")}
    assert len(digests) == 12
