"""EADP against plain loops, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trio.selectors.token_graph import (
    CASES,
    NUM_KEEP,
    Case,
    assert_chosen,
    build_engine,
    cosine,
    export_selector,
    filled,
    findings,
    first_best,
    random_case,
)
from trio_edge.runtime.errors import ScheduleError
from trio_edge.trio.selectors.eadp import Eadp


def scaled(values: dict[int, float]) -> dict[int, float]:
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    return {i: 1.0 if high - low < 1e-6 else (value - low) / (high - low) for i, value in values.items()}


def importance(case: Case, *, text_share: float = 0.2, global_share: float = 0.5) -> dict[int, float]:
    words = range(case.num_text)
    mean = case.text[: case.num_text].astype(np.float64).sum(0)
    whole = {i: -cosine(mean, case.tokens[i]) for i in case.shown}
    single = [{i: -cosine(case.text[t], case.tokens[i]) for i in case.shown} for t in words]
    entropy = []
    for t in words:
        top = max(single[t].values(), default=0.0)
        mass = {i: math.exp(100 * (value - top)) for i, value in single[t].items()}
        shares = [value / sum(mass.values()) for value in mass.values()]
        entropy.append(-sum(p * math.log(p) for p in shares if p > 0))
    counted = sorted(words, key=lambda t: entropy[t])[: max(1, math.floor(text_share * len(words) + 1e-4))]
    weights = {t: math.exp(-(entropy[t] - entropy[counted[0]]) / 0.01) for t in counted}
    total = sum(weights.values())
    dense = {i: sum(weights[t] / total * single[t][i] for t in counted) for i in case.shown}
    return scaled({i: global_share * whole[i] + (1 - global_share) * dense[i] for i in case.shown})


def cover(case: Case, weights: dict[int, float], num_keep: int) -> list[int]:
    shown = case.shown
    similarity = {(i, j): (1 + cosine(case.tokens[i], case.tokens[j])) / 2 for i in shown for j in shown}
    covered = dict.fromkeys(shown, 0.0)
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        best = first_best({
            i: sum(weights[j] * max(0.0, similarity[i, j] - covered[j]) for j in shown)
            for i in shown if i not in chosen
        })  # fmt: skip
        chosen.append(best)
        covered = {j: max(covered[j], similarity[best, j]) for j in shown}
    return filled(chosen, case, num_keep)


def reference(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    return cover(case, {i: value**2 for i, value in importance(case).items()}, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_selector(Eadp(num_keep=NUM_KEEP), tmp_path_factory.mktemp("eadp") / "eadp.onnx")


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(Eadp(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = Eadp(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


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
            weights[y * width + x] = total / norm
    kept = Eadp(num_keep=7, exponent=1.0, grid=(height, width))(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == cover(case, weights, 7) != cover(case, importance(case), 7)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_shares_of_the_text_count_as_in_plain_loops(share: float) -> None:
    case = random_case(13)
    weights = {i: value**2 for i, value in importance(case, text_share=share, global_share=0.1).items()}
    kept = Eadp(num_keep=8, text_share=share, global_share=0.1)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == cover(case, weights, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_share": 1.5}, r"text_share: expected 0\.\.1, got 1\.5"),
        ({"global_share": -0.1}, r"global_share: expected 0\.\.1, got -0\.1"),
        ({"exponent": 0.0}, r"exponent: expected > 0, got 0"),
        ({"grid": (1, 8)}, r"grid: expected at least 2 x 2, got \(1, 8\)"),
    ],
    ids=["text share", "global share", "exponent", "grid"],
)
def test_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Eadp(num_keep=2, **settings)
