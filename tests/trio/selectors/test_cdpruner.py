"""CDPruner: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import numpy as np
import torch

from tests.reference.token_selectors import cdpruner, relevance
from tests.trio.selectors.token_graph import cosine, random_case
from trio_edge.trio.selectors.tokens.cdpruner import CdPruner


def test_each_step_takes_the_token_with_the_largest_determinant() -> None:
    case = random_case(12, num_tokens=20)
    worth = relevance(case)
    kernel = np.array(
        [[worth[i] * cosine(case.tokens[i], case.tokens[j]) * worth[j] for j in worth] for i in worth]
    )
    chosen: list[int] = []
    for _ in range(6):
        free = [i for i in range(20) if i not in chosen]
        chosen.append(max(free, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
    scores = CdPruner(num_keep=6)(case.inputs(torch.float64)).scores_N
    assert torch.argsort(scores, descending=True)[:6].tolist() == chosen


def test_tokens_beyond_the_rank_follow_by_relevance() -> None:
    case = random_case(14)
    case.tokens[:, 3:] = 0.0
    kept = CdPruner(num_keep=9)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == cdpruner(case, 9)
