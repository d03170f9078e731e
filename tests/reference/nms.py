"""Greedy feature-space NMS as the paper states it: one token at a time, similarities in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def cosine_similarity(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return all pairs' cosine; a zero vector is similar to nothing."""
    rows = features.astype(np.float64)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return unit @ unit.T


def greedy_nms(
    features: NDArray[np.float32], scores: NDArray[Any], *, num_keep: int, threshold: float
) -> list[int]:
    """Return the kept indices in raster order; ties go to the lower index."""
    similarity = cosine_similarity(features)
    survivors: list[int] = []
    suppressed: list[int] = []
    for token in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        close = any(similarity[token, other] >= threshold for other in survivors)
        (suppressed if close else survivors).append(token)
    return sorted((survivors + suppressed)[:num_keep])
