"""CDPruner against plain loops and determinants, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

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
from trio_edge.trio.selectors.cdpruner import CdPruner


def relevance(case: Case, sign: int = 1) -> dict[int, float]:
    raw = {
        i: sign
        * sum(cosine(case.tokens[i], case.text[t]) for t in range(case.num_text))
        / max(case.num_text, 1)
        for i in case.shown
    }
    low, high = min(raw.values(), default=0.0), max(raw.values(), default=0.0)
    return {i: 1.0 if high - low < 1e-6 else (raw[i] - low + 1e-6) / (high - low) for i in raw}


def reference(case: Case, num_keep: int = NUM_KEEP, sign: int = 1) -> list[int]:
    shown, worth = case.shown, relevance(case, sign)
    kernel = {
        (i, j): worth[i] * cosine(case.tokens[i], case.tokens[j]) * worth[j] for i in shown for j in shown
    }
    left = {i: kernel[i, i] for i in shown}
    rows: list[dict[int, float]] = []
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        free = [i for i in shown if i not in chosen]
        best = first_best({i: left[i] if left[i] > 0 else worth[i] - 3.0 for i in free})
        chosen.append(best)
        row = dict.fromkeys(shown, 0.0)
        if left[best] > 0:
            for i in shown:
                explained = sum(earlier[best] * earlier[i] for earlier in rows)
                row[i] = (kernel[best, i] - explained) / np.sqrt(left[best])
        rows.append(row)
        for i in shown:
            left[i] -= row[i] ** 2
            if left[i] <= 1e-4 * kernel[i, i]:
                left[i] = 0.0
    return filled(chosen, case, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_selector(CdPruner(num_keep=NUM_KEEP), tmp_path_factory.mktemp("cdpruner") / "cdpruner.onnx")


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(CdPruner(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = CdPruner(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


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


def test_negative_sign_prefers_tokens_unlike_the_text() -> None:
    case = random_case(13)
    kept = CdPruner(num_keep=7, sign=-1)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, 7, sign=-1) != reference(case, 7)


def test_tokens_beyond_the_rank_follow_by_relevance() -> None:
    case = random_case(14)
    case.tokens[:, 3:] = 0.0
    kept = CdPruner(num_keep=9)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, 9)


def test_another_sign_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"sign: expected 1 or -1, got 2"):
        CdPruner(num_keep=2, sign=2)
