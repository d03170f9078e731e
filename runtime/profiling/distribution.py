"""Repeated measurements in numbers: percentiles, how well the median is known, and ratios of medians.

The median's interval comes from order statistics, so it assumes nothing about how the times are distributed. A ratio's
comes from a bootstrap over rounds: in a round each bundle ran once, so what disturbs the machine disturbs both. So does
that of a line's slope.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

RESAMPLES = 5_000
SEED = 0
_Z_95 = 1.959963984540054


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
    interval_95: tuple[float, float]
    """Of the median."""

    @property
    def relative_width(self) -> float:
        """Width of the median's interval as a share of the median; infinite at 0."""
        low, high = self.interval_95
        return (high - low) / self.p50 if self.p50 > 0 else math.inf


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of two medians."""

    value: float
    interval_95: tuple[float, float]
    rounds: int


class LineFit(msgspec.Struct, frozen=True, kw_only=True):
    """A straight line through times: ``base_ms + ms_per_1000_rows · rows / 1000``."""

    base_ms: float
    ms_per_1000_rows: float
    interval_95: tuple[float, float]
    """Of ``ms_per_1000_rows``."""

    @property
    def words(self) -> str:
        """As ``2.01 ms +0.12 ms per 1000 rows (0.10 – 0.14)``."""
        low, high = self.interval_95
        return f"{self.base_ms:.2f} ms {self.ms_per_1000_rows:+.2g} ms per 1000 rows ({low:.2g} – {high:.2g})"


def distribution(values: Sequence[float]) -> Distribution:
    """Return the distribution of at least one value."""
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
        interval_95=median_interval(values),
    )


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median: two of the values, for few of them the least and the largest."""
    data = sorted(values)
    num = len(data)
    half = _Z_95 * math.sqrt(num) / 2
    low = max(0, math.floor(num / 2 - half))
    high = min(num - 1, math.ceil(num / 2 + half))
    return float(data[low]), float(data[high])


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Return median(values) / median(reference) with its interval.

    Args:
        values: One per round.
        reference: One per round, the same rounds in the same order; above 0.
    """
    ours, theirs = np.asarray(values, np.float64), np.asarray(reference, np.float64)
    if len(ours) != len(theirs):
        raise ValueError(f"expected as many values as in the reference, got {len(ours)} and {len(theirs)}")
    drawn = np.random.default_rng(SEED).integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(
        value=float(np.median(ours) / np.median(theirs)),
        interval_95=(float(low), float(high)),
        rounds=len(ours),
    )


def line_fit(rows: Sequence[float], milliseconds: Sequence[Sequence[float]]) -> LineFit | None:
    """Return the line through the medians by least squares; None for fewer than two points.

    Args:
        rows: One for each point.
        milliseconds: For each point one per round, the same rounds in the same order.
    """
    if len(rows) < 2:
        return None
    times = np.asarray(milliseconds, np.float64)
    slope, base = np.polyfit(rows, np.median(times, axis=1), 1)
    drawn = np.random.default_rng(SEED).integers(times.shape[1], size=(RESAMPLES, times.shape[1]))
    slopes, _ = np.polyfit(rows, np.median(times[:, drawn], axis=2), 1)
    low, high = np.percentile(slopes, (2.5, 97.5))
    return LineFit(
        base_ms=float(base),
        ms_per_1000_rows=1e3 * float(slope),
        interval_95=(1e3 * float(low), 1e3 * float(high)),
    )
