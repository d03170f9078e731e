"""Percentiles, ratios, lines, and confidence intervals against known cases and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from trio_edge.profiling.statistics import (
    bootstrap_interval,
    distribution,
    line_fit,
    median_interval,
    median_ratio,
    paired_interval,
    score_interval,
    wilson_interval,
)


def every_resample(values: list[float], images: list[str]) -> tuple[float, float]:
    """The percentile interval over all equally likely draws of images."""
    groups = [[v for v, p in zip(values, images) if p == name] for name in sorted(set(images))]
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
    images = [f"p{i}" for i in range(6)]
    expected = every_resample([a - b for a, b in zip(ours, full)], images)
    assert paired_interval(ours, full, images) == pytest.approx(expected, abs=0.02)


def test_bootstrap_draws_images_with_all_their_questions() -> None:
    values = [0.9, 0.8, 1.0, 0.1, 0.0, 0.2, 0.6, 0.5, 0.3, 0.4]
    images = ["a", "a", "a", "b", "b", "b", "c", "d", "e", "e"]
    interval = bootstrap_interval(values, images)
    assert interval == pytest.approx(every_resample(values, images), abs=0.02)
    assert interval != pytest.approx(bootstrap_interval(values, list("abcdefghij")), abs=0.02)


def test_bootstrap_is_repeatable_and_depends_on_its_seed() -> None:
    values, images = list(np.linspace(0, 1, 50)), [str(i) for i in range(50)]
    assert bootstrap_interval(values, images) == bootstrap_interval(values, images)
    assert bootstrap_interval(values, images) != bootstrap_interval(values, images, seed=1)


def test_scores_of_0_and_1_get_wilsons_interval_and_others_a_bootstrap() -> None:
    images = list("abcd")
    assert score_interval([1.0, 0.0, 1.0, 1.0], images) == wilson_interval(3, 4)
    assert score_interval([0.3, 0.6, 1.0, 0.0], images) == bootstrap_interval([0.3, 0.6, 1.0, 0.0], images)


def test_a_distribution_has_the_percentiles_of_its_values() -> None:
    found = distribution(list(range(101)))
    assert (found.p50, found.p95, found.p99, found.least, found.most) == (50, 95, 99, 0, 100)
    assert (found.mean, found.spread, found.count) == (50, 50, 101)


def test_the_medians_interval_holds_the_true_median_in_95_of_100_samples() -> None:
    generator = np.random.default_rng(0)
    for size in (10, 40):
        held = 0
        for _ in range(1000):
            low, high = median_interval(list(generator.exponential(size=size)))
            held += low <= np.log(2) <= high
        assert 0.93 <= held / 1000 <= 0.995


def test_tokens_of_one_answer_that_are_disturbed_together_make_nothing_more_certain() -> None:
    generator, held = np.random.default_rng(0), 0
    for _ in range(300):
        answers = generator.exponential(size=(30, 1)) + 0.01 * generator.exponential(size=(30, 15))
        low, high = median_interval(list(answers.ravel()), per_run=15) or (0.0, 0.0)
        held += low <= np.log(2) <= high
    assert held / 300 >= 0.9
    alone = median_interval(list(range(100)))
    assert alone == (40, 60)
    assert median_interval(list(range(100)), per_run=1) == alone


def test_fewer_than_six_runs_have_no_interval() -> None:
    values = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert median_interval(values) is None
    assert median_interval([*values, 6.0]) == (1.0, 6.0)
    assert median_interval(values * 6, per_run=6) is None
    assert distribution([7.0]).range == (7.0, 7.0)
    assert median_ratio(values, values).interval_95 is None
    fit = line_fit([0, 1000], [values, [value + 1 for value in values]])
    assert fit is not None
    assert (fit.interval_95, fit.words) == (None, "3.00 ms +1 ms per 1000 rows")


def test_what_disturbs_both_bundles_leaves_their_ratio_certain() -> None:
    disturbance = np.random.default_rng(1).uniform(1, 10, 30)
    paired = median_ratio(list(2 * disturbance), list(disturbance))
    assert paired.value == pytest.approx(2)
    assert paired.interval_95 == pytest.approx((2, 2))
    shuffled = median_ratio(list(2 * disturbance[::-1]), list(disturbance))
    assert shuffled.interval_95[1] - shuffled.interval_95[0] > 0.1


def test_a_ratio_needs_pairs() -> None:
    with pytest.raises(ValueError, match="expected as many values as in the reference, got 2 and 1"):
        median_ratio([1.0, 2.0], [1.0])


def test_a_line_is_found_behind_a_drift_that_all_points_share() -> None:
    rows, drift = [0, 500, 1000, 2000], np.array([0.0, 5.0, 0.1, -0.1, 0.2, 0.1])
    fit = line_fit(rows, [2.0 + 0.25 * count / 1000 + drift for count in rows])
    assert (fit.base_ms, fit.ms_per_1000_rows) == (pytest.approx(2.1), pytest.approx(0.25))
    assert fit.interval_95 == pytest.approx((0.25, 0.25))
    assert fit.words == "2.10 ms +0.25 ms per 1000 rows (0.25 – 0.25)"


def test_a_slope_that_rounds_disagree_on_has_a_wide_interval() -> None:
    low, high = line_fit([0, 1000], [[1.0] * 6, [1.0, 2.0, 0.0] * 2]).interval_95
    assert low < -0.9
    assert high > 0.9


def test_one_point_is_no_line() -> None:
    assert line_fit([7], [[1.0, 2.0]]) is None
