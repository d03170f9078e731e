"""95 % confidence intervals: Wilson's for a proportion, bootstraps over pictures for means and paired differences.

Questions about one picture are not independent, so a bootstrap draws pictures with all their questions. Percentiles
of ``RESAMPLES`` draws, seeded: the same data give the same interval.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RESAMPLES = 10_000
SEED = 0
_Z_95 = 1.959963984540054
_PERCENTILES = (2.5, 97.5)
_MAX_DRAWN = 4_000_000  # pictures at once: 32 MB of indices


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's score interval of ``correct`` of ``total``; (0, 1) of nothing."""
    if not total:
        return 0.0, 1.0
    n, p, z = total, correct / total, _Z_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_interval(scores: Sequence[float], pictures: Sequence[str]) -> tuple[float, float]:
    """Return the interval of the mean score: Wilson's if every score is 0 or 1, else a bootstrap."""
    if all(score in (0.0, 1.0) for score in scores):
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_interval(scores, pictures)


def paired_interval(
    scores: Sequence[float], reference: Sequence[float], pictures: Sequence[str], *, seed: int = SEED
) -> tuple[float, float]:
    """Return the interval of mean(scores) - mean(reference), both of the same questions in the same order."""
    differences = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
    return bootstrap_interval(differences, pictures, seed=seed)


def bootstrap_interval(
    values: Sequence[float], pictures: Sequence[str], *, seed: int = SEED, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the percentile interval of the mean of ``values``, drawing pictures with replacement.

    Args:
        values: One per question.
        pictures: Each question's picture.
        seed: Of the draws.
        resamples: How many.
    """
    sums, counts = _by_picture(values, pictures)
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWN // len(sums))
    means = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, resamples - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), _PERCENTILES)
    return float(low), float(high)


def _by_picture(
    values: Sequence[float], pictures: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return per picture the sum of its questions' values and their number."""
    _, group = np.unique(np.asarray(pictures), return_inverse=True)
    sums: NDArray[np.float64] = np.bincount(group, weights=np.asarray(values, np.float64)).astype(np.float64)
    return sums, np.bincount(group).astype(np.float64)
