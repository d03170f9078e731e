"""SCOPE: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import torch

from tests.trio.selectors.token_graph import random_case
from trio_edge.trio.selectors.tokens.scope import Scope


def test_scores_tell_the_order_of_choice() -> None:
    inputs = random_case(13).inputs(torch.float64)
    scores = Scope(num_keep=4)(inputs).scores_N
    assert sorted(scores[scores > 0].tolist()) == [1, 2, 3, 4]
    assert int(scores.argmax()) == Scope(num_keep=1)(inputs).kept_K.item()
