"""Exact greedy feature-space NMS on the host, for the rare prompt whose chains outgrow the graph's rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def greedy_nms(
    features: NDArray[Any], scores: NDArray[np.float32], *, num_keep: int, threshold: float
) -> NDArray[np.int32]:
    """Return the ``num_keep`` kept tokens in ascending order.

    Tokens are taken by descending score (ties: lower index first); each suppresses the later ones whose cosine
    similarity is at least ``threshold``; suppressed ones fill up, in the same order, if too few survive.

    Args:
        features: [N, D].
        scores: [N].
        num_keep: K <= N.
        threshold: τ.

    Source:
        arXiv 2602.04657, the reference code's selection.
    """
    features = features.astype(np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, np.finfo(np.float32).tiny)
    order = np.argsort(-scores, kind="stable")
    suppressed = np.zeros(len(scores), dtype=bool)
    survivors: list[int] = []
    for token in order:
        if len(survivors) == num_keep:
            break
        if suppressed[token]:
            continue
        survivors.append(int(token))
        suppressed |= unit @ unit[token] >= threshold
    if len(survivors) < num_keep:
        taken = set(survivors)
        survivors += [int(token) for token in order if int(token) not in taken][: num_keep - len(survivors)]
    return np.sort(np.array(survivors, dtype=np.int32))
