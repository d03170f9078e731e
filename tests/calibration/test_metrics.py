"""Reading and scoring of answers, by hand-computed examples."""

from __future__ import annotations

from typing import Any

import pytest

from trio_edge.calibration.metrics import (
    METRICS,
    exact_normal,
    metric_for,
    read_choice,
    vqa_normal,
    yes_no_rates,
)
from trio_edge.calibration.questions import Sample


def question(*answers: str, choices: tuple[str, ...] = ()) -> Sample:
    fields: Any = {"images": (), "image_names": ("p",), "image_id": "p"}
    return Sample(
        index=0, sample_id="0", kind="all", question="?", answers=answers, choices=choices, **fields
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  Red  Cube. ", "red cube"), ("red", "red"), ("U.S.A.", "u.s.a"), ("", "")],
)
def test_exact_match_ignores_case_blanks_and_a_final_period(text: str, expected: str) -> None:
    assert exact_normal(text) == expected


def test_exact_match_takes_any_of_several_answers() -> None:
    metric, asked = METRICS["exact"], question("sofa", "Couch")
    assert [metric.score(metric.read(text, asked), asked) for text in ("couch.", "chair")] == [1.0, 0.0]


VQA_TEXTS = {
    "case_and_article": ("The Dogs", "dogs"),
    "final_period": ("yes.", "yes"),
    "decimal_point_stays": ("it is 2.5.", "it is 2.5"),
    "comma_between_digits_vanishes": ("100,978", "100978"),
    "other_comma_is_a_blank": ("red,blue", "red blue"),
    "hyphen_is_a_blank": ("t-shirt", "t shirt"),
    "apostrophe_stays": ("girl's", "girl's"),
    "colon_stays": ("2:50 pm", "2:50 pm"),
    "number_words": ("Two dogs and ten cats", "2 dogs and 10 cats"),
    "none_is_zero": ("none", "0"),
    "contraction": ("dont know", "don't know"),
    "contraction_whole": ("can't", "can't"),
    "only_an_article": ("a", ""),
    "underscore_and_slash": ("a_b/c", "b c"),
}


@pytest.mark.parametrize("name", list(VQA_TEXTS))
def test_vqa_normalisation(name: str) -> None:
    text, expected = VQA_TEXTS[name]
    assert vqa_normal(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"),
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten_annotators(agreeing: int, expected: float) -> None:
    """One agrees: for 9 of 10 subsets of 9 it is 1/3, for one 0: 0.3. Two: (8 · 2/3 + 2 · 1/3) / 10 = 0.6."""
    metric = METRICS["vqa"]
    asked = question(*["A dog"] * agreeing, *[f"other {i}" for i in range(10 - agreeing)])
    assert metric.score(metric.read("dog.", asked), asked) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("no, there is none", "no"),
        ("There is not a dog. Yes.", "no"),
        ("Yes. There is no cat.", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
    ],
)
def test_yes_and_no_are_read_as_in_pope(text: str, expected: str) -> None:
    assert METRICS["yes-no"].read(text, question("yes")) == expected


def test_yes_no_rates_of_a_known_case() -> None:
    """3 true yes, 1 false yes, 4 true no, 2 false no."""
    counts = yes_no_rates(["yes"] * 4 + ["no"] * 6, ["yes"] * 3 + ["no"] * 5 + ["yes"] * 2)
    rates = (counts.accuracy, counts.precision, counts.recall, counts.f1, counts.yes_ratio)
    assert rates == pytest.approx((0.7, 0.75, 0.6, 2 / 3, 0.4))


def test_yes_no_rates_of_answers_that_are_all_no() -> None:
    counts = yes_no_rates(["no", "no"], ["yes", "no"])
    assert (counts.precision, counts.recall, counts.f1, counts.yes_ratio) == (0.0, 0.0, 0.0, 0.0)


CHOICES = ("a dog", "a cat", "a bird of prey")
CHOICE_TEXTS = {
    "letter": ("B", "B"),
    "small_letter": ("b", "B"),
    "in_brackets": ("(C)", "C"),
    "with_a_mark": ("A.", "A"),
    "letter_and_text": ("B. a cat", "B"),
    "letter_and_a_longer_answer": ("B) it is furry", "B"),
    "text": ("A Cat.", "B"),
    "text_in_a_sentence": ("I see a bird of prey here", "C"),
    "answer_is": ("The answer is C.", "C"),
    "two_texts": ("a dog and a cat", ""),
    "an_article_is_no_letter": ("A horse", ""),
    "letter_beyond_the_choices": ("D", ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", list(CHOICE_TEXTS))
def test_a_choice_is_read(name: str) -> None:
    text, expected = CHOICE_TEXTS[name]
    assert read_choice(text, CHOICES) == expected


@pytest.mark.parametrize("answer", ["B", "a cat"])
def test_a_choice_is_right_by_letter_or_by_text(answer: str) -> None:
    metric, asked = METRICS["choice"], question(answer, choices=CHOICES)
    scores = [metric.score(metric.read(text, asked), asked) for text in ("B", "A cat", "A", "?")]
    assert scores == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([question("B", choices=CHOICES)], "choice"),
        ([question("yes"), question("No")], "yes-no"),
        ([question(*["x"] * 10)], "vqa"),
        ([question("yes"), question("red")], "exact"),
        ([question("yes"), question("B", choices=CHOICES)], "exact"),
    ],
    ids=["choices", "yes_or_no", "ten_answers", "words", "mixed"],
)
def test_the_fields_choose_the_metric(questions: list[Sample], expected: str) -> None:
    assert metric_for(questions).name == expected
