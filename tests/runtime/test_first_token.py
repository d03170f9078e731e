"""The divergence of first tokens, from a summary of keep-all's."""

from __future__ import annotations

import numpy as np
import pytest

from trio_edge.runtime.model.first_token import NUM_SUMMED_UP, first_token_kl, summary_of


def full_kl(reference: np.ndarray, logits: np.ndarray) -> float:
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in map(np.float64, (reference, logits)))
    return float((p * np.log(p / q)).sum())


def logits(size: int, *, seed: int, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def test_a_small_vocabulary_gives_the_full_divergence() -> None:
    ours, full = logits(NUM_SUMMED_UP, seed=0), logits(NUM_SUMMED_UP, seed=1)
    assert first_token_kl(summary_of(full), ours) == pytest.approx(full_kl(full, ours), rel=1e-5)


def test_a_large_vocabulary_gives_a_close_lower_bound() -> None:
    full = logits(32_000, seed=2, scale=4.0)
    ours = full + logits(32_000, seed=3, scale=0.3)
    exact, found = full_kl(full, ours), first_token_kl(summary_of(full), ours)
    assert 0.5 * exact < found <= exact


def test_equal_logits_have_no_divergence() -> None:
    same = logits(1000, seed=4)
    assert first_token_kl(summary_of(same), same) == pytest.approx(0.0, abs=1e-6)


def test_logits_with_infinite_gaps_give_a_number() -> None:
    full, ours = np.full(1000, -1e4, np.float32), np.full(1000, -1e4, np.float32)
    full[3], ours[5] = 1e4, 1e4
    assert np.isfinite(first_token_kl(summary_of(full), ours))
