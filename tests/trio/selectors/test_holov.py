"""HoloV: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.reference.token_selectors import holov
from tests.trio.selectors.token_graph import random_case
from trio_edge.trio.selectors.tokens.holov import HoloV


@pytest.fixture(autouse=True)
def _eight_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_edge.trio.selectors.tokens.holov._NUM_CHUNKS", 8)


def test_every_chunk_keeps_its_best_token_if_all_weigh_the_same() -> None:
    case = random_case(12, num_tokens=32)
    case.attention[:] = np.tile([0.25, 0.5, 0.25, 0.25], 8)
    case.tokens[:] = 1.0
    kept = HoloV(num_keep=8)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == list(range(1, 32, 4))


def test_quota_beyond_a_chunk_goes_to_the_best_of_the_others() -> None:
    case = random_case(13, num_tokens=32)
    case.attention[:] = np.linspace(0.001, 0.002, 32)
    case.attention[:4] = 100.0
    kept = HoloV(num_keep=9)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == holov(case, 9, 8)
    assert kept[:4] == [0, 1, 2, 3]
