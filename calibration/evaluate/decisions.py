"""Questions of a data set as questions with a fixed set of answers, and how well their probabilities fit what is right.

- Brier score: mean over questions of the sum over options of (probability - 1 for the right answer, 0 for others)²; 0 is best.
- Calibration error: mean over ten equal bins of confidence, weighted by their questions, of confidence minus accuracy, unsigned.
- Log loss: mean of minus the logarithm of the right answer's probability.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from trio_edge.calibration.metrics import exact_normal, read_choice
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.decisions.questions import MOST_OPTIONS, Question
from trio_edge.runtime.decisions.wording import WORDING_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.calibration.questions import Sample
    from trio_edge.runtime.bundle.manifest import Manifest

_NUM_BINS = 10
_TEMPERATURES = (0.05, 20.0)
_STEPS = 60  # of a golden section, which makes the range 10^-12 of itself


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """The probabilities of one question's options."""

    kind: str
    """The ``Question``'s."""
    shares: tuple[float, ...]
    right: int
    """Index of the right option."""
    label_mass: float
    turned: tuple[float, ...] = ()
    """The same options' probabilities when they are listed in the opposite order; empty if the prompt lists none."""

    @property
    def confidence(self) -> float:
        """Probability of the likeliest option."""
        return max(self.shares)

    @property
    def is_right(self) -> bool:
        """Whether the likeliest option is right; of equal ones the first counts."""
        return self.shares.index(self.confidence) == self.right


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """The questions whose confidence lies in one of ten equal ranges."""

    confidence: float
    """Mean."""
    accuracy: float
    questions: int


class Reliability(msgspec.Struct, frozen=True, kw_only=True):
    """Measures of probabilities against the right answers, over all questions of a run."""

    brier: float
    calibration_error: float
    log_loss: float
    confidence: float
    """Mean."""
    label_mass: float
    """Mean."""
    changed_by_order: float | None
    """Share of answers that change when the options are listed in the opposite order; None if no prompt lists any."""
    bins: list[Bin]


def with_options(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples with the options that they are asked with.

    A sample's choices; yes and no where one of them is the answer; else all answers to samples of the same kind.

    Raises:
        DataError: If a kind has one answer only, or too many.
    """
    by_kind: dict[str, dict[str, None]] = defaultdict(dict)
    for sample in samples:
        by_kind[sample.kind] |= dict.fromkeys(map(exact_normal, sample.answers))
    found = []
    for sample in samples:
        options = sample.choices or tuple(sorted(by_kind[sample.kind]))
        if not sample.choices and {*map(exact_normal, sample.answers)} <= {"yes", "no"}:
            options = ("yes", "no")
        if not 2 <= len(options) <= MOST_OPTIONS:
            raise DataError(
                f"{sample.where}: expected 2..{MOST_OPTIONS} different answers to questions of the kind {sample.kind!r:.60}, got"
                f" {len(options)}; give the question 'choices'"
            )
        found.append(replace(sample, options=options))
    return found


def question_of(sample: Sample) -> Question:
    """Return a sample of ``with_options`` as a question."""
    if sample.options == ("yes", "no"):
        return Question.yes_no(sample.prompt)
    return Question.choice(sample.prompt, sample.options)


def lists_options(manifest: Manifest) -> bool:
    """Return whether a bundle's prompts list the options, so that their order can matter."""
    spec = manifest.decisions
    return spec is not None and (spec.labels == "letters" or spec.version != WORDING_VERSION)


def right_option(sample: Sample) -> int:
    """Return the index of the option that is the sample's first answer."""
    if sample.choices:
        return ord(read_choice(sample.answers[0], sample.choices)) - ord("A")
    return sample.options.index(exact_normal(sample.answers[0]))


def reliability(judged: Sequence[Judged]) -> Reliability:
    """Return the measures of at least one question."""
    confidence = np.array([one.confidence for one in judged])
    is_right = np.array([one.is_right for one in judged], float)
    place = np.minimum((confidence * _NUM_BINS).astype(int), _NUM_BINS - 1)
    bins = [
        Bin(
            confidence=float(confidence[place == index].mean()),
            accuracy=float(is_right[place == index].mean()),
            questions=int((place == index).sum()),
        )
        for index in range(_NUM_BINS)
        if (place == index).any()
    ]
    turned = [one for one in judged if one.turned]
    changed = [int(np.argmax(one.shares)) != int(np.argmax(one.turned)) for one in turned]
    return Reliability(
        brier=float(np.mean([_brier(one) for one in judged])),
        calibration_error=sum(abs(one.confidence - one.accuracy) * one.questions for one in bins)
        / len(judged),
        log_loss=float(np.mean([-_log_share(one, 1.0) for one in judged])),
        confidence=float(confidence.mean()),
        label_mass=float(np.mean([one.label_mass for one in judged])),
        changed_by_order=float(np.mean(changed)) if turned else None,
        bins=bins,
    )


def _brier(one: Judged) -> float:
    wanted = np.arange(len(one.shares)) == one.right
    return float(((np.array(one.shares) - wanted) ** 2).sum())


def _log_share(one: Judged, temperature: float) -> float:
    """Return the logarithm of the right option's probability after another division by ``temperature``."""
    logs = _logs(one) / temperature
    return float(logs[one.right] - np.logaddexp.reduce(logs))


def _logs(one: Judged) -> NDArray[np.float64]:
    return np.log(np.maximum(one.shares, np.finfo(float).tiny))


def fitted_temperature(judged: Sequence[Judged]) -> float:
    """Return the temperature in 0.05..20 with the least log loss, for probabilities at temperature 1.

    The loss has one minimum in the logarithm of the temperature, which a golden section finds.
    """
    low, high = np.log(_TEMPERATURES)
    ratio = (np.sqrt(5) - 1) / 2

    def loss(place: float) -> float:
        return -float(np.mean([_log_share(one, float(np.exp(place))) for one in judged]))

    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return float(np.exp((low + high) / 2))


def at_temperature(one: Judged, temperature: float) -> Judged:
    """Return the question with its probabilities evened out by ``temperature``."""
    logs = _logs(one) / temperature
    shares = np.exp(logs - np.logaddexp.reduce(logs))
    return msgspec.structs.replace(one, shares=tuple(shares.tolist()))
