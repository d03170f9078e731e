"""DivPrune: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import pytest
import torch

from tests.trio.selectors.token_graph import random_case
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.tokens.divprune import DivPrune


def test_newlines_take_part_like_any_other_token() -> None:
    case = random_case(12, newline_every=2)
    case.tokens[~case.newline] = case.tokens[0]
    kept = DivPrune(num_keep=8)(case.inputs(torch.float64)).kept_K.tolist()
    assert sum(bool(case.newline[i]) for i in kept) >= 7


def test_no_token_is_kept_at_all_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_keep: expected >= 1, got 0"):
        DivPrune(num_keep=0)


def test_more_tokens_than_there_are_rows_are_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_keep: expected <= 40 .*, got 41"):
        DivPrune(num_keep=41)(random_case().inputs(torch.float32))
