"""Metrics of answers: exact match, VQA accuracy, yes or no as in POPE, multiple choice.

A metric reduces an answer's text to a reading and scores the reading, 0 to 1. Two bundles agree where their readings do.

| name | reading | score |
|---|---|---|
| exact | lower case, single blanks, no final period | 1 if it is one of the answers, read alike |
| vqa | ``vqa_normal`` | mean over the ten annotators of min(1, agreeing others / 3) |
| yes-no | "no" if the first sentence has the word no or not, else "yes" | 1 if it is the answer |
| iou | the first four numbers in a row, a box x0, y0, x1, y1 | 1 if it overlaps the answer's box by half of their union |
| choice | the option's letter; "" if the answer names none or several | 1 if it is the answer's letter |
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.calibration.questions import Sample


VQA_ANNOTATORS = 10
_LETTERS = string.ascii_uppercase
MAX_CHOICES = len(_LETTERS)


@dataclass(frozen=True)
class Metric:
    """One way to score an answer."""

    name: str
    read: Callable[[str, Sample], str]
    """Returns the reading of an answer's text."""
    score: Callable[[str, Sample], float]
    """Returns the score of a reading, 0 to 1."""
    complaint: Callable[[Sample], str | None]
    """Returns the reason why a question cannot be scored, as "expected …, got …"; None if it can."""


class YesNoRates(msgspec.Struct, frozen=True, kw_only=True):
    """POPE's figures; "yes" is the positive class."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float


def yes_no_rates(readings: Sequence[str], expected: Sequence[str]) -> YesNoRates:
    """Return the rates of readings "yes" and "no" against the expected ones; a rate of nothing is 0."""
    pairs = list(zip(readings, expected))
    true_positives, said_yes = pairs.count(("yes", "yes")), [one for one, _ in pairs].count("yes")
    is_yes = list(expected).count("yes")
    return YesNoRates(
        accuracy=_share(true_positives + pairs.count(("no", "no")), len(pairs)),
        precision=_share(true_positives, said_yes),
        recall=_share(true_positives, is_yes),
        f1=_share(2 * true_positives, said_yes + is_yes),
        yes_ratio=_share(said_yes, len(pairs)),
    )


def exact_normal(text: str) -> str:
    """Return the text in lower case with single blanks and without a final period."""
    return " ".join(text.lower().split()).rstrip(".")


def metric_for(questions: Sequence[Sample]) -> Metric:
    """Return the metric for the questions' fields: choices, the answers yes and no, ten answers, else exact match."""
    for name in ("choice", "yes-no", "vqa"):
        if all(METRICS[name].complaint(question) is None for question in questions):
            return METRICS[name]
    return METRICS["exact"]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _exact_score(reading: str, question: Sample) -> float:
    return float(reading in {exact_normal(answer) for answer in question.answers})


def _vqa_score(reading: str, question: Sample) -> float:
    agrees = [vqa_normal(answer) == reading for answer in question.answers]
    total = sum(agrees)
    return sum(min(1.0, (total - one) / 3) for one in agrees) / len(agrees)


def _vqa_complaint(question: Sample) -> str | None:
    count = len(question.answers)
    return None if count == VQA_ANNOTATORS else f"expected {VQA_ANNOTATORS} answers for vqa, got {count}"


def read_yes_no(text: str, _question: Sample | None = None) -> str:
    """Return "no" if the first sentence has the word no or not, else "yes": POPE's rule, with its bias to yes."""
    words = re.findall(r"\w+", text.split(".")[0].lower())
    return "no" if "no" in words or "not" in words else "yes"


def _yes_no_score(reading: str, question: Sample) -> float:
    return float(reading == exact_normal(question.answers[0]))


def _yes_no_complaint(question: Sample) -> str | None:
    answers = [exact_normal(answer) for answer in question.answers]
    if len(answers) == 1 and answers[0] in ("yes", "no"):
        return None
    return f"expected the one answer yes or no for yes-no, got {', '.join(question.answers)[:60]!r}"


def read_choice(text: str, choices: Sequence[str]) -> str:
    """Return the letter of the option that ``text`` names, by its letter or its text; "" if it names none or several.

    A letter counts alone ("b", "(B)"), before a mark ("B. a dog") or after "answer is". So "A dog" does not name option A.
    """
    letters, normal = _LETTERS[: len(choices)], exact_normal(text)
    options = [exact_normal(choice) for choice in choices]
    if options.count(normal) == 1:
        return letters[options.index(normal)]
    alone = re.fullmatch(r"\(?([a-z])[).:,]?", normal)
    marked = re.match(r"\s*\(?([A-Z])[).:,](\s|$)", text) or re.search(
        r"\banswer is:?\s*\(?([A-Z])\b(?!\s+\w)", text
    )
    found = (alone or marked)[1].upper() if alone or marked else ""  # type: ignore[index]
    if found:
        return found if found in letters else ""
    words = _spaced(normal)
    spaced = zip(letters, map(_spaced, options))
    named = [letter for letter, option in spaced if option.strip() and option in words]
    return named[0] if len(named) == 1 else ""


def _spaced(text: str) -> str:
    """Return the words between blanks, one at each end, so that whole words are found."""
    return " ".join(["", *re.findall(r"\w+", text), ""])


def _choice_score(reading: str, question: Sample) -> float:
    return float(reading != "" and reading == read_choice(question.answers[0], question.choices))


def _choice_complaint(question: Sample) -> str | None:
    if not 2 <= len(question.choices) <= MAX_CHOICES:
        return f"expected 2..{MAX_CHOICES} choices for choice, got {len(question.choices)}"
    if len(question.answers) == 1 and read_choice(question.answers[0], question.choices):
        return None
    return f"expected one answer that is a letter or text of the choices, got {', '.join(question.answers)[:60]!r}"


def read_box(text: str, _question: Sample | None = None) -> str:
    """Return the first four numbers one after the other in ``text``, as ``x0,y0,x1,y1``; "" if it has none."""
    number = r"-?\d+(?:\.\d+)?"
    found = re.search(rf"(?<![\w.]){number}(?:[\s,()]+{number}){{3}}", text)
    return ",".join(re.findall(number, found[0])) if found else ""


def _iou_score(reading: str, question: Sample) -> float:
    if not reading:
        return 0.0
    ours, theirs = (
        [float(part) for part in box.split(",")] for box in (reading, read_box(question.answers[0]))
    )
    shared, *areas = (
        max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
        for box in ([*map(max, ours[:2], theirs), *map(min, ours[2:], theirs[2:])], ours, theirs)
    )
    return float(shared >= 0.5 * (sum(areas) - shared) > 0.0)


def _iou_complaint(question: Sample) -> str | None:
    if len(question.answers) == 1 and read_box(question.answers[0]):
        return None
    return f"expected one answer with a box of four numbers for iou, got {', '.join(question.answers)[:60]!r}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", lambda text, _question: exact_normal(text), _exact_score, lambda _question: None),
        Metric("vqa", lambda text, _question: vqa_normal(text), _vqa_score, _vqa_complaint),
        Metric("iou", read_box, _iou_score, _iou_complaint),
        Metric("yes-no", read_yes_no, _yes_no_score, _yes_no_complaint),
        Metric(
            "choice",
            lambda text, question: read_choice(text, question.choices),
            _choice_score,
            _choice_complaint,
        ),
    )
}


def check_metric(questions: Sequence[Sample], metric: Metric) -> None:
    """Raise DataError unless every question can be scored with ``metric``."""
    for question in questions:
        if complaint := metric.complaint(question):
            raise DataError(f"{question.where}: {complaint}; correct the line or choose another --metric")


# The VQA challenge's normalisation of answers, by which "The Dogs." and "dogs" are one answer.
#
# Lower case; numbers as digits; no articles; apostrophes put back into contractions; every punctuation mark but the
# apostrophe and the colon (times: "2:50") becomes a blank. A period stays as a decimal point, and a comma between
# digits vanishes ("100,978" is "100978").
#
# Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and the challenge's page on evaluation. The
# challenge's code skips all this where the ten annotators agree; we never do.


_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_NOT = "ain are can could did does do had has have is might must need should was were wo would"  # …n't
_STEMS = {  # without those that make words of their own: its, were, ill, id, shed
    "ve": "could i might must should they we would you",
    "ll": "it that they who you",
    "re": "they you",
    "s": "he here how she that there what when where who why",
    "d": "he it they who you",
    "m": "i",
}
_CONTRACTIONS = (
    {f"{stem}nt": f"{stem}n't" for stem in _NOT.split() if stem not in ("ain", "can", "wo")}
    | {"aint": "ain't", "cant": "can't", "wont": "won't"}
    | {f"{stem}{end}": f"{stem}'{end}" for end, stems in _STEMS.items() for stem in stems.split()}
    | {"yall": "y'all", "oclock": "o'clock", "maam": "ma'am", "lets": "let's"}
)


def vqa_normal(text: str) -> str:
    """Return the answer as the VQA challenge compares it."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
