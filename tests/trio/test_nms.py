"""The parallel selection equals the greedy one, and says when it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from tests.reference.nms import cosine_similarity, greedy_nms
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.nms import FeatureNms, _symmetric_product

THRESHOLD = 0.8


def _select(
    features: NDArray[np.float32], scores: NDArray[np.float32], *, num_keep: int, rounds: int = 64,
    num_visual: int | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[list[int], int]:  # fmt: skip
    module = FeatureNms(num_keep=num_keep, threshold=THRESHOLD, rounds=rounds)
    count = torch.tensor([len(scores) if num_visual is None else num_visual], dtype=torch.int32)
    kept, unsettled = module(torch.from_numpy(features).to(dtype), torch.from_numpy(scores), count)
    assert kept.dtype == torch.int64
    assert unsettled.dtype == torch.int32
    return kept.tolist(), int(unsettled)


def _near_threshold(features: NDArray[np.float32]) -> bool:
    """A pair whose similarity rounds to either side of the threshold has no defined answer."""
    return bool((np.abs(cosine_similarity(features) - THRESHOLD) < 1e-6).any())


def _clustered(rng: np.random.Generator, count: int, *, clusters: int, spread: float) -> NDArray[np.float32]:
    centres = rng.normal(size=(clusters, 12))
    rows = centres[rng.integers(0, clusters, count)] + spread * rng.normal(size=(count, 12))
    return rows.astype(np.float32)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_parallel_equals_greedy(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 24), "N")
    features = data.draw(npst.arrays(np.float32, (count, 3), elements=st.integers(-3, 3).map(float)))
    scores = data.draw(npst.arrays(np.float32, count, elements=st.integers(0, 5).map(float)))
    num_keep = data.draw(st.integers(1, count), "K")
    assume(not _near_threshold(features))
    expected = greedy_nms(features, scores, num_keep=num_keep, threshold=THRESHOLD)
    assert _select(features, scores, num_keep=num_keep) == (expected, 0)


@pytest.mark.parametrize("spread", [0.05, 0.3, 0.6], ids=["tight clusters", "clusters", "loose clusters"])
def test_parallel_equals_greedy_on_hundreds_of_random_pictures(spread: float) -> None:
    rng = np.random.default_rng(int(100 * spread))
    compared = 0
    for _ in range(300):
        count = int(rng.integers(1, 40))
        features = _clustered(rng, count, clusters=int(rng.integers(1, 9)), spread=spread)
        scores = rng.integers(0, 20, count).astype(np.float32)
        num_keep = int(rng.integers(1, count + 1))
        if not _near_threshold(features):
            expected = greedy_nms(features, scores, num_keep=num_keep, threshold=THRESHOLD)
            assert _select(features, scores, num_keep=num_keep) == (expected, 0)
            compared += 1
    assert compared > 270


@pytest.mark.parametrize("count", [576, 1100], ids=["one block", "mirrored blocks"])
def test_parallel_equals_greedy_at_picture_size(count: int) -> None:
    rng = np.random.default_rng(1)
    features = _clustered(rng, count, clusters=120, spread=0.35)
    scores = rng.random(count).astype(np.float32)
    expected = greedy_nms(features, scores, num_keep=count // 8, threshold=THRESHOLD)
    assert _select(features, scores, num_keep=count // 8, rounds=16) == (expected, 0)


@pytest.mark.parametrize("num_keep", [1, 7, 16])
def test_equal_scores_and_equal_features_keep_the_first_tokens(num_keep: int) -> None:
    kept, unsettled = _select(np.ones((16, 4), np.float32), np.ones(16, np.float32), num_keep=num_keep)
    assert (kept, unsettled) == (list(range(num_keep)), 0)


def test_different_features_keep_the_best_scores_in_raster_order() -> None:
    scores = np.array([3, 9, 1, 7, 5, 8], np.float32)
    assert _select(np.eye(6, dtype=np.float32), scores, num_keep=3) == ([1, 3, 5], 0)


def test_suppressed_tokens_top_up_in_score_order() -> None:
    features = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)
    assert _select(features, np.array([1, 4, 3, 2], np.float32), num_keep=3) == ([1, 2, 3], 0)


def test_keeping_all_tokens_is_the_identity() -> None:
    features = _clustered(np.random.default_rng(5), 30, clusters=3, spread=0.1)
    assert _select(features, np.arange(30, dtype=np.float32), num_keep=30)[0] == list(range(30))


def test_similarity_at_the_threshold_suppresses() -> None:
    module = FeatureNms(num_keep=2, threshold=0.5, rounds=4)
    features = torch.tensor([[1.0, 1, 1, 1], [1.0, 0, 0, 0], [0.0, 0, 1, -1]])  # cos is exactly 1/2
    kept, _ = module(features * 2, torch.tensor([3.0, 2.0, 1.0]), torch.tensor(3))
    assert kept.tolist() == [0, 2]


def test_zero_vectors_are_similar_to_nothing() -> None:
    features = np.zeros((4, 3), np.float32)
    assert _select(features, np.array([1, 2, 4, 3], np.float32), num_keep=2) == ([2, 3], 0)


@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=["tiny", "huge"])
def test_lengths_of_the_vectors_do_not_matter(scale: float) -> None:
    features = _clustered(np.random.default_rng(5), 30, clusters=3, spread=0.1)
    scores = np.arange(30, dtype=np.float32)
    scaled = (features * scale).astype(np.float32)
    assert _select(scaled, scores, num_keep=8) == _select(features, scores, num_keep=8)


@pytest.mark.parametrize("num_visual", [0, 1, 5, 11, 19, 20])
def test_padding_ranks_last_and_suppresses_nothing(num_visual: int) -> None:
    rng = np.random.default_rng(num_visual)
    features = _clustered(rng, 20, clusters=3, spread=0.1)
    features[num_visual:] = features[0]
    scores = rng.random(20).astype(np.float32)
    scores[num_visual:] = 99.0  # whatever stands there is not read
    expected = greedy_nms(features[:num_visual], scores[:num_visual], num_keep=11, threshold=THRESHOLD)
    padding = list(range(num_visual, num_visual + 11 - len(expected)))
    assert _select(features, scores, num_keep=11, num_visual=num_visual) == (expected + padding, 0)


@pytest.mark.parametrize("rounds", [1, 2, 5, 15])
def test_chain_longer_than_the_rounds_is_reported(rounds: int) -> None:
    unsettled = _select(_path(20), -np.arange(20, dtype=np.float32), num_keep=10, rounds=rounds)[1]
    assert unsettled > 0


@pytest.mark.parametrize("rounds", [20, 24])
def test_chain_within_the_rounds_is_exact(rounds: int) -> None:
    kept, unsettled = _select(_path(20), -np.arange(20, dtype=np.float32), num_keep=10, rounds=rounds)
    assert (kept, unsettled) == (list(range(0, 20, 2)), 0)


def _path(length: int) -> NDArray[np.float32]:
    """Unit vectors of which each is similar to its predecessor only: greedy alternates along the path."""
    rows = np.zeros((length, length), np.float32)
    rows[0, 0] = 1
    for index in range(1, length):
        rows[index] = 0.85 * rows[index - 1]
        rows[index, index] = np.sqrt(1 - 0.85**2)
    return rows


def test_half_precision_features_are_compared_in_float32() -> None:
    features = _clustered(np.random.default_rng(5), 50, clusters=5, spread=0.3).astype(np.float16)
    scores = np.arange(50, dtype=np.float32)
    half = _select(features.astype(np.float32), scores, num_keep=12, dtype=torch.float16)
    assert half == _select(features.astype(np.float32), scores, num_keep=12)


def test_mirrored_blocks_equal_the_whole_product() -> None:
    unit = torch.randn(1027, 8)
    product = _symmetric_product(unit)
    torch.testing.assert_close(product, unit @ unit.T)
    assert torch.equal(product, product.T)


def test_more_kept_than_there_are_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_keep: expected <= 4 .*, got 5; keep fewer"):
        _select(np.eye(4, dtype=np.float32), np.ones(4, np.float32), num_keep=5)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_keep": 0, "threshold": 0.8, "rounds": 1}, "num_keep: expected >= 1, got 0"),
        ({"num_keep": 1, "threshold": 1.5, "rounds": 1}, "nms_threshold: expected 0 < τ <= 1, got 1.5"),
        ({"num_keep": 1, "threshold": 0.8, "rounds": 0}, "nms_rounds: expected >= 1, got 0"),
    ],
    ids=["no token", "threshold above one", "no round"],
)
def test_impossible_settings_are_refused(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        FeatureNms(**settings_)  # type: ignore[arg-type]
