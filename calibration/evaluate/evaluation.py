"""Exact-match accuracy of one opened bundle on generated samples, in a few lines of Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.calibration.evaluate.intervals import wilson_interval
from trio_edge.calibration.evaluate.running.answering import OWN_SELECTION, Answerer, Asking, Outcome, Task
from trio_edge.calibration.questions import questions_of
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio_edge.calibration.questions import SampleLike
    from trio_edge.runtime.pipeline import Pipeline


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
        return wilson_interval(self.correct, self.total)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All outcomes of one run."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> Accuracy:
        """Over all questions."""
        return Accuracy(round(sum(outcome.score for outcome in self.outcomes)), len(self.outcomes))

    @property
    def average_keep(self) -> float:
        """Mean over questions of the share of visual tokens that a decoder layer processes."""
        shares = [outcome.processed_tokens / outcome.visual_tokens for outcome in self.outcomes]
        return sum(shares) / max(len(shares), 1)


def evaluate(
    pipeline: Pipeline, samples: Iterable[SampleLike], *, selection: str = OWN_SELECTION
) -> Evaluation:
    """Answer every sample's question greedily and compare: exact match after trimming and lower-casing.

    Args:
        pipeline: The bundle.
        samples: What to ask, for instance ``shapes.held_out(100)``.
        selection: ``OWN_SELECTION`` (the bundle's select graphs) or one of ``baselines.BASELINES``.

    Raises:
        DataError: If a sample cannot be asked.
    """
    answerer = Answerer(Asking(bundle=Path(), selection=selection), pipeline)
    outcomes = []
    for question in questions_of(samples):
        outcome = answerer.answer(Task(question))
        if not isinstance(outcome, Outcome):
            raise DataError(f"{outcome.where}: {outcome.reason}")
        outcomes.append(outcome)
    return Evaluation(tuple(outcomes))
