"""Statistics of repeated measurements and of scored answers: percentiles, 95 % intervals, ratios of medians, lines.

Times: the median's interval comes from order statistics, which assume no distribution. Tokens of one run are disturbed together,
so runs count as the independent samples. Intervals of ratios and slopes come from a bootstrap over rounds: in a round each
bundle runs once, under the same disturbances. Fewer than ``LEAST_FOR_INTERVAL`` runs have no interval, because even their whole
range misses the median more often than one time in twenty.

Scores: Wilson's interval for a proportion, else a bootstrap over images with all their questions, because questions about one
image are not independent. All draws are seeded: the same data give the same interval.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LEAST_FOR_INTERVAL = 6
RESAMPLES = 10_000
SEED = 0
_ROUND_RESAMPLES = 5_000
"""Draws of rounds: fewer, because medians take longer than means."""
_MAX_DRAWN = 4_000_000  # images drawn at once: 32 MB of indices
_PERCENTILES = (2.5, 97.5)
_Z_95 = 1.959963984540054
Interval = tuple[float, float]


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity over all runs, in its own unit."""

    count: int
    p50: float
    p95: float
    p99: float
    mean: float
    least: float
    most: float
    spread: float
    """Distance between the first and the third quartile."""
    interval_95: Interval | None

    @property
    def range(self) -> Interval:
        """The interval, or the range of all values if there is none."""
        return self.interval_95 or (self.least, self.most)

    @property
    def relative_width(self) -> float:
        """Width of the median's interval as a share of the median; infinite at 0 or without an interval."""
        if self.interval_95 is None or self.p50 <= 0:
            return math.inf
        low, high = self.interval_95
        return (high - low) / self.p50


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of two medians."""

    value: float
    interval_95: Interval | None
    rounds: int


class LineFit(msgspec.Struct, frozen=True, kw_only=True):
    """A straight line through times: ``base_ms + ms_per_1000_rows · rows / 1000``."""

    base_ms: float
    ms_per_1000_rows: float
    interval_95: Interval | None

    @property
    def words(self) -> str:
        """The line as ``2.01 ms +0.12 ms per 1000 rows (0.10 – 0.14)``."""
        text = f"{self.base_ms:.2f} ms {self.ms_per_1000_rows:+.2g} ms per 1000 rows"
        return text + in_brackets(self.interval_95, ".2g")


def in_brackets(interval: Interval | None, digits: str) -> str:
    """Return an interval as text after a number: `` (0.10 – 0.14)``; an empty text without one."""
    return "" if interval is None else f" ({interval[0]:{digits}} – {interval[1]:{digits}})"


def distribution(values: Sequence[float], *, per_run: int = 1) -> Distribution:
    """Return the distribution of at least one value; each run has ``per_run`` successive values."""
    data = np.sort(np.asarray(values, np.float64))
    p25, p50, p75, p95, p99 = (float(one) for one in np.percentile(data, (25, 50, 75, 95, 99)))
    return Distribution(
        count=len(data),
        p50=p50,
        p95=p95,
        p99=p99,
        mean=float(data.mean()),
        least=float(data[0]),
        most=float(data[-1]),
        spread=p75 - p25,
        interval_95=median_interval(values, per_run=per_run),
    )


def distribution_of_runs(runs: Sequence[Sequence[float]]) -> Distribution:
    """Return the distribution of a quantity with several times per run."""
    counts = {len(times) for times in runs}
    # in runs of different lengths each time counts as a run
    per_run = counts.pop() if len(counts) == 1 else 1
    return distribution([time for times in runs for time in times], per_run=per_run)


def median_interval(values: Sequence[float], *, per_run: int = 1) -> Interval | None:
    """Return the 95 % interval of the median, two of the values; None for fewer than ``LEAST_FOR_INTERVAL`` runs."""
    runs = np.asarray(values, np.float64).reshape(-1, per_run)
    if len(runs) < LEAST_FOR_INTERVAL:
        return None
    data, num = np.sort(runs, axis=None), runs.size
    above = (runs > np.median(data)).mean(axis=1) + (runs == np.median(data)).mean(axis=1) / 2
    # the share above the median varies by 1/2 with one value per run, and by no less than with independent values
    spread = max(math.sqrt(float(((above - 0.5) ** 2).mean())), 0.5 / math.sqrt(per_run))
    half = _Z_95 * spread * num / math.sqrt(len(runs))
    low = max(0, math.floor(num / 2 - half))
    high = min(num - 1, math.ceil(num / 2 + half))
    return float(data[low]), float(data[high])


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Return median(values) / median(reference) with its interval; both have one value per round, in the same order."""
    ours, theirs = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if len(ours) != len(theirs):
        raise ValueError(f"expected as many values as in the reference, got {len(ours)} and {len(theirs)}")
    drawn = np.random.default_rng(SEED).integers(len(ours), size=(_ROUND_RESAMPLES, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    return Ratio(
        value=float(np.median(ours) / np.median(theirs)),
        interval_95=_middle(ratios, rounds=len(ours)),
        rounds=len(ours),
    )


def line_fit(rows: Sequence[float], milliseconds: Sequence[Sequence[float]]) -> LineFit | None:
    """Return the line through the medians by least squares; None for fewer than two points.

    ``milliseconds`` has one value per round for each point, the rounds in the same order.
    """
    if len(rows) < 2:
        return None
    times = np.asarray(milliseconds, np.float64)
    slope, base = np.polyfit(rows, np.median(times, axis=1), 1)
    drawn = np.random.default_rng(SEED).integers(times.shape[1], size=(_ROUND_RESAMPLES, times.shape[1]))
    slopes, _ = np.polyfit(rows, np.median(times[:, drawn], axis=2), 1)
    return LineFit(
        base_ms=float(base),
        ms_per_1000_rows=1e3 * float(slope),
        interval_95=_middle(1e3 * slopes, rounds=times.shape[1]),
    )


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return Wilson's score interval of ``correct`` of ``total``; (0, 1) if ``total`` is 0."""
    if not total:
        return 0.0, 1.0
    n, p, z = total, correct / total, _Z_95
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_interval(scores: Sequence[float], images: Sequence[str]) -> tuple[float, float]:
    """Return the interval of the mean score: Wilson's if every score is 0 or 1, else a bootstrap."""
    if all(score in (0.0, 1.0) for score in scores):
        return wilson_interval(round(sum(scores)), len(scores))
    return bootstrap_interval(scores, images)


def paired_interval(
    scores: Sequence[float], reference: Sequence[float], images: Sequence[str]
) -> tuple[float, float]:
    """Return the interval of mean(scores) - mean(reference); both have the same questions in the same order."""
    differences = [ours - theirs for ours, theirs in zip(scores, reference, strict=True)]
    return bootstrap_interval(differences, images)


def bootstrap_interval(
    values: Sequence[float], images: Sequence[str], *, seed: int = SEED
) -> tuple[float, float]:
    """Return the percentile interval of the mean of ``values``, drawing ``images``, one per value, with replacement."""
    # for each image the sum of its questions' values, and their number
    _, group = np.unique(np.asarray(images), return_inverse=True)
    sums, counts = np.bincount(group, weights=np.asarray(values, np.float64)), np.bincount(group)
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_DRAWN // len(sums))
    means = []
    for start in range(0, RESAMPLES, at_once):
        drawn = generator.integers(len(sums), size=(min(at_once, RESAMPLES - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), _PERCENTILES)
    return float(low), float(high)


def _middle(drawn: NDArray[np.float64], *, rounds: int) -> Interval | None:
    low, high = (float(value) for value in np.percentile(drawn, _PERCENTILES))
    return None if rounds < LEAST_FOR_INTERVAL else (low, high)
