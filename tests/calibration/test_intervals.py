"""Confidence intervals against known cases and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from trio_edge.calibration.evaluate.intervals import (
    bootstrap_interval,
    paired_interval,
    score_interval,
    wilson_interval,
)


def every_resample(values: list[float], pictures: list[str]) -> tuple[float, float]:
    """The percentile interval over all equally likely draws of pictures."""
    groups = [[v for v, p in zip(values, pictures) if p == name] for name in sorted(set(pictures))]
    means = [
        np.mean([value for group in draw for value in group]) for draw in product(groups, repeat=len(groups))
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def test_wilson_interval_of_a_known_case() -> None:
    """8 of 10: 0.490 to 0.943 (Wilson 1927, formula with z = 1.96)."""
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=2e-4)


@pytest.mark.parametrize("correct", [0, 7])
def test_wilson_interval_stays_between_0_and_1(correct: int) -> None:
    low, high = wilson_interval(correct, 7)
    assert 0.0 <= low < high <= 1.0


def test_paired_bootstrap_equals_all_resamples() -> None:
    ours, full = [1.0, 0.0, 1.0, 0.3, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.6]
    pictures = [f"p{i}" for i in range(6)]
    expected = every_resample([a - b for a, b in zip(ours, full)], pictures)
    assert paired_interval(ours, full, pictures) == pytest.approx(expected, abs=0.02)


def test_bootstrap_draws_pictures_with_all_their_questions() -> None:
    values = [0.9, 0.8, 1.0, 0.1, 0.0, 0.2, 0.6, 0.5, 0.3, 0.4]
    pictures = ["a", "a", "a", "b", "b", "b", "c", "d", "e", "e"]
    interval = bootstrap_interval(values, pictures)
    assert interval == pytest.approx(every_resample(values, pictures), abs=0.02)
    assert interval != pytest.approx(bootstrap_interval(values, list("abcdefghij")), abs=0.02)


def test_bootstrap_is_repeatable_and_depends_on_its_seed() -> None:
    values, pictures = list(np.linspace(0, 1, 50)), [str(i) for i in range(50)]
    assert bootstrap_interval(values, pictures) == bootstrap_interval(values, pictures)
    assert bootstrap_interval(values, pictures) != bootstrap_interval(values, pictures, seed=1)


def test_scores_of_0_and_1_get_wilsons_interval_and_others_a_bootstrap() -> None:
    pictures = list("abcd")
    assert score_interval([1.0, 0.0, 1.0, 1.0], pictures) == wilson_interval(3, 4)
    assert score_interval([0.3, 0.6, 1.0, 0.0], pictures) == bootstrap_interval(
        [0.3, 0.6, 1.0, 0.0], pictures
    )
