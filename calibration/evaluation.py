"""Exact-match accuracy of a bundle on questions about pictures, with confidence intervals."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trio_edge.calibration.baselines import baseline
from trio_edge.runtime.errors import ShapeError
from trio_edge.runtime.vision_inputs import TilePictures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from trio_edge.runtime.pipeline import Pipeline

_MAX_ANSWER_TOKENS = 16
_Z_95 = 1.959963984540054


class Question(Protocol):
    """One question about one picture; ``trio_edge.calibration.shapes.Sample`` is one."""

    @property
    def picture(self) -> Image.Image | Path:
        """The picture, or where it is."""

    @property
    def question(self) -> str:
        """What is asked."""

    @property
    def answer(self) -> str:
        """The expected answer."""

    @property
    def kind(self) -> str:
        """Type of question, for the breakdown."""

    @property
    def sample_id(self) -> str:
        """Name that pairs outcomes of different runs."""


@dataclass(frozen=True, slots=True)
class FileQuestion:
    """A question from a JSON-lines file."""

    picture: Path
    question: str
    answer: str
    kind: str
    sample_id: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the bundle answered to one question; kept for paired comparisons."""

    sample_id: str
    kind: str
    expected: str
    answered: str
    correct: bool
    visual_tokens: int
    average_keep: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A proportion with its 95 % Wilson interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """Fraction of correct answers."""
        return self.correct / self.total if self.total else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound, Wilson score, 95 %."""
        if not self.total:
            return 0.0, 1.0
        n, p, z = self.total, self.value, _Z_95
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return centre - half, centre + half


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All outcomes of one run."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> Accuracy:
        """Over all questions."""
        return _accuracy(self.outcomes)

    @property
    def by_kind(self) -> dict[str, Accuracy]:
        """Per question type, in alphabetical order."""
        kinds = sorted({outcome.kind for outcome in self.outcomes})
        return {kind: _accuracy([o for o in self.outcomes if o.kind == kind]) for kind in kinds}

    @property
    def average_keep(self) -> float:
        """Mean over questions of the fraction of visual tokens that a decoder layer processes."""
        return sum(outcome.average_keep for outcome in self.outcomes) / max(len(self.outcomes), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "accuracy": self.accuracy.value,
            "interval_95": list(self.accuracy.interval),
            "questions": len(self.outcomes),
            "average_keep": self.average_keep,
            "by_kind": {
                kind: {"accuracy": part.value, "interval_95": list(part.interval), "questions": part.total}
                for kind, part in self.by_kind.items()
            },
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }


def _accuracy(outcomes: Sequence[Outcome]) -> Accuracy:
    return Accuracy(correct=sum(outcome.correct for outcome in outcomes), total=len(outcomes))


def evaluate(
    pipeline: Pipeline,
    questions: Iterable[Question],
    *,
    selection: str = "bundle",
    on_answer: Callable[[Outcome], None] = lambda _outcome: None,
) -> Evaluation:
    """Answer every question greedily and compare: exact match after trimming and lower-casing.

    Args:
        pipeline: The bundle.
        questions: What to ask.
        selection: "bundle" (its own select graphs) or one of ``baselines.BASELINES`` at the same schedule.
        on_answer: Called after every question, for progress.
    """
    outcomes = []
    pictures = pipeline.pictures
    base_tokens = pictures.processing.patches_per_tile if isinstance(pictures, TilePictures) else 0
    for index, question in enumerate(questions):
        choose = None if selection == "bundle" else baseline(selection, seed=index, base_tokens=base_tokens)
        limit = min(_MAX_ANSWER_TOKENS, pipeline.manifest.max_new_tokens)
        answer = pipeline.generate(question.picture, question.question, max_new_tokens=limit, choose=choose)
        answered = _normal(answer.text)
        outcomes.append(
            Outcome(
                sample_id=question.sample_id,
                kind=question.kind,
                expected=question.answer,
                answered=answered,
                correct=answered == _normal(question.answer),
                visual_tokens=answer.statistics.visual_tokens,
                average_keep=answer.statistics.average_keep,
                ttft_ms=answer.statistics.ttft_ms,
            )
        )
        on_answer(outcomes[-1])
    return Evaluation(tuple(outcomes))


def _normal(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")


def read_questions(path: Path) -> Iterator[FileQuestion]:
    """Yield the questions of a JSON-lines file: objects with image, question, answer, and optionally kind and id.

    Raises:
        ShapeError: If the file cannot be read or a line is no such object; says which line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: expected a JSON-lines file ({error}); check the name") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            yield FileQuestion(
                picture=path.parent / str(entry["image"]),
                question=str(entry["question"]),
                answer=str(entry["answer"]),
                kind=str(entry.get("kind", "all")),
                sample_id=str(entry.get("id", number)),
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError):
            raise ShapeError(
                f"{path} line {number}: expected an object with image, question and answer, got {line[:80]!r}; mend the line"
            ) from None
