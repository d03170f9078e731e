"""Questions with a fixed set of answers, and the probabilities of these answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, final

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.manifest import DEFAULT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Statistics
    from trio_edge.runtime.images.processing import ImageLayout

QuestionKind = Literal["yes-no", "choice", "score"]
MOST_QUESTIONS = 400
"""Questions of one call."""
MOST_OPTIONS = 255
MOST_LEVELS = 10


class Option(NamedTuple):
    """One of the answers that a question allows."""

    name: str
    description: str = ""
    """When it applies; empty if the name says it."""


@final
@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the answers that it allows. Made by ``yes_no``, ``choice`` and ``score``."""

    kind: QuestionKind
    text: str
    options: tuple[Option, ...]
    """yes and no; the options of a choice; or the levels of a score, lowest first."""
    name: str | None = None
    """Name in the output; None for none."""

    @classmethod
    def yes_no(cls, text: str, *, yes: str = "", no: str = "", name: str | None = None) -> Question:
        """Return a question whose answer is yes or no; ``yes`` and ``no`` describe when each applies."""
        return cls("yes-no", text, (Option("yes", yes), Option("no", no)), name)

    @classmethod
    def choice(
        cls, text: str, options: Sequence[str] | Mapping[str, str], *, name: str | None = None
    ) -> Question:
        """Return a question with 2 to ``MOST_OPTIONS`` options: names, or descriptions by name."""
        return cls("choice", text, _options(options), name)

    @classmethod
    def score(
        cls, text: str, levels: Sequence[str] | Mapping[str, str], *, name: str | None = None
    ) -> Question:
        """Return a question with 2 to ``MOST_LEVELS`` levels, lowest first: names, or descriptions by name."""
        return cls("score", text, _options(levels), name)

    def checked(self) -> Question:
        """Return the question, with tuples.

        Raises:
            ShapeError: If a part has another type, is empty or comes twice, or there are too few or too many options.
        """
        where = f"question {self.text!r:.80}"
        if not isinstance(self.text, str) or not self.text.strip():
            raise ShapeError(f"{where}: expected text, got none; write a question")
        if self.kind not in ("yes-no", "choice", "score"):
            raise ShapeError(
                f"{where}: expected the kind 'yes-no', 'choice' or 'score', got {self.kind!r:.80}"
            )
        noun, most = ("levels", MOST_LEVELS) if self.kind == "score" else ("options", MOST_OPTIONS)
        options = tuple(self.options)
        if not 2 <= len(options) <= most:
            raise ShapeError(f"{where}: expected 2..{most} {noun}, got {len(options)}; give some")
        for option in options:
            texts = isinstance(option, Option) and all(isinstance(part, str) for part in option)
            if not texts or not option.name.strip():
                raise ShapeError(f"{where}: expected a name for each of its {noun}, got {option!r:.80}")
        names = [option.name.strip() for option in options]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ShapeError(f"{where}: expected different {noun}, got {twice!r:.80} twice; name each once")
        return replace(self, options=options)

    def reversed(self) -> Question:
        """Return the question with its options in the opposite order."""
        return replace(self, options=self.options[::-1])


def check_questions(questions: object) -> list[Question]:
    """Return 1 to ``MOST_QUESTIONS`` questions.

    Raises:
        ShapeError: If there is another number, or one of them cannot be asked.
    """
    found = list(questions) if isinstance(questions, Sequence) else []
    if not 1 <= len(found) <= MOST_QUESTIONS or not all(isinstance(one, Question) for one in found):
        raise ShapeError(
            f"questions: expected a list of 1..{MOST_QUESTIONS} questions, got {questions!r:.80}; see Question.yes_no"
        )
    return [question.checked() for question in found]


def _options(given: object) -> tuple[Option, ...]:
    if isinstance(given, Mapping):
        return tuple(Option(name, description or "") for name, description in given.items())
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise ShapeError(
            f"options: expected a list of names, or descriptions by name, got {type(given).__name__}"
        )
    return tuple(option if isinstance(option, Option) else Option(option) for option in given)


@final
@dataclass(frozen=True, slots=True)
class Decision:
    """The probabilities of a question's answers."""

    question: Question
    probabilities: tuple[float, ...]
    """One for each of ``question.options``; their sum is 1."""
    label_mass: float
    """Share of the model's whole probability that these answers had. When it is small, the model wanted to say something else,
    and the probabilities mean little."""
    statistics: Statistics
    """Cost of this answer. Questions that share a selection share its visual tokens and first prefill."""
    kept: tuple[NDArray[np.int32], ...] = ()
    """Kept tokens of each stage: ascending indices into the visual tokens of all images."""
    layouts: tuple[ImageLayout, ...] = ()
    """Layout of each image's visual tokens that entered the decoder, for ``images.overlay``."""

    @property
    def choice(self) -> str:
        """Name of the likeliest answer; of equal ones the first."""
        return self.question.options[self.probabilities.index(max(self.probabilities))].name

    @property
    def confidence(self) -> float:
        """Probability of the likeliest answer."""
        return max(self.probabilities)

    @property
    def margin(self) -> float:
        """Difference between the two highest probabilities."""
        first, second, *_ = sorted(self.probabilities, reverse=True)
        return first - second

    @property
    def score(self) -> float:
        """Mean of the levels' numbers 0, 1, … by their probabilities; for a yes-no question, the probability of yes."""
        if self.question.kind == "yes-no":
            return self.probabilities[0]
        return sum(level * share for level, share in enumerate(self.probabilities))

    def by_name(self) -> dict[str, float]:
        """Return the probabilities by the options' names."""
        return {option.name: share for option, share in zip(self.question.options, self.probabilities)}

    def to_dict(self) -> dict[str, Any]:
        """Return the decision as JSON values of six digits: what trio-run and trio-watch print."""

        def short(value: float) -> float:
            return float(f"{value:.6g}")

        question, statistics = self.question, self.statistics
        return {
            "name": question.name,
            "kind": question.kind,
            "question": question.text,
            "answer": self.choice,
            "confidence": short(self.confidence),
            **({"score": short(self.score)} if question.kind == "score" else {}),
            "probabilities": {name: short(share) for name, share in self.by_name().items()},
            "label_mass": short(self.label_mass),
            "visual_tokens": statistics.visual_tokens,
            "kept_tokens": list(statistics.kept_tokens),
            "text_tokens": statistics.text_tokens,
            **({} if statistics.level == DEFAULT else {"level": statistics.level}),
            "ms": short(statistics.ttft_ms),
        }
