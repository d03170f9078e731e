"""SCOPE: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.reference.token_selectors import scope
from tests.trio.selectors.token_graph import random_case
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.tokens.scope import Scope


def test_exponent_of_zero_leaves_the_saliency_out() -> None:
    case = random_case(12)
    kept = Scope(num_keep=5, exponent=0.0)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == scope(case, 5, exponent=0.0)


def test_scores_tell_the_order_of_choice() -> None:
    inputs = random_case(13).inputs(torch.float64)
    scores = Scope(num_keep=4)(inputs).scores_N
    assert sorted(scores[scores > 0].tolist()) == [1, 2, 3, 4]
    assert int(scores.argmax()) == Scope(num_keep=1)(inputs).kept_K.item()


def test_negative_exponent_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"exponent: expected >= 0, got -1"):
        Scope(num_keep=2, exponent=-1.0)
