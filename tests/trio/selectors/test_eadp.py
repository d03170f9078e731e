"""EADP: its own rules and refusals; ``test_token_selectors`` compares it with plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.reference.token_selectors import cover, importance
from tests.trio.selectors.token_graph import export_once, random_case, run_graph
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.tokens.eadp import Eadp


def test_importance_on_a_grid_is_smoothed_with_mirrored_edges() -> None:
    case = random_case(12, num_tokens=30)
    height, width = 5, 6
    raw = np.array(list(importance(case).values())).reshape(height, width)
    weights = {}
    for y in range(height):
        for x in range(width):
            total = norm = 0.0
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    factor = math.exp(-(dy * dy + dx * dx) / 2)
                    row, column = y + dy, x + dx
                    row = 1 if row < 0 else height - 2 if row == height else row
                    column = 1 if column < 0 else width - 2 if column == width else column
                    total, norm = total + factor * raw[row, column], norm + factor
            weights[y * width + x] = (total / norm) ** 2
    selector = Eadp(num_keep=7, grid=(height, width))
    kept = selector(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == cover(case, weights, 7) != cover(case, importance(case), 7)
    graph = export_once(selector, num_tokens=height * width)
    assert run_graph(graph, case)[0].tolist() == kept


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shares_of_the_text_count_as_in_plain_loops(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_TEXT_SHARE", share), ("_GLOBAL_SHARE", 0.1)):
        monkeypatch.setattr(f"trio_edge.trio.selectors.tokens.eadp.{name}", value)
    case = random_case(13)
    weights = {i: value**2 for i, value in importance(case, text_share=share, global_share=0.1).items()}
    kept = Eadp(num_keep=8)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == cover(case, weights, 8)


def test_a_grid_of_one_row_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"grid: expected at least 2 x 2, got \(1, 8\)"):
        Eadp(num_keep=2, grid=(1, 8))
