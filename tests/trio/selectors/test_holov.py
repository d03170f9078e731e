"""HoloV against plain loops, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

import math
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
    random_case,
)
from trio_edge.runtime.errors import ScheduleError
from trio_edge.trio.selectors.holov import HoloV


def reference(case: Case, num_keep: int = NUM_KEEP, num_chunks: int = 16) -> list[int]:
    shown = case.shown
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    for place, i in enumerate(shown):
        chunks[place * num_chunks // len(shown)].append(i)
    attention = {i: float(case.attention[i]) for i in shown}
    score: dict[int, float] = {}
    for chunk in chunks:
        variance = {}
        for i in chunk:
            row = [0.0 if i == j else cosine(case.tokens[i], case.tokens[j]) for j in chunk]
            variance[i] = float(np.var(row))
        total = sum(variance.values())
        scale = sum(1000 * attention[i] for i in chunk) / total if total > 0 else 0.0
        score |= {i: 1000 * attention[i] + 0.09 * scale * variance[i] for i in chunk}
    used = [p for p in range(num_chunks) if chunks[p]]
    mean = {p: sum(score[i] for i in chunks[p]) / len(chunks[p]) for p in used}
    if sum(mean.values()) == 0:
        mean = dict.fromkeys(used, 1.0)
    weight = {p: mean[p] / sum(mean.values()) for p in used}
    quota = {p: math.floor(weight[p] * num_keep + 1e-4) for p in used}
    step = max(weight.values(), default=1.0) / 2**17
    for p in sorted(used, key=lambda p: (-round(weight[p] / step), p))[: num_keep - sum(quota.values())]:
        quota[p] += 1
    chosen = [i for p in used for i in sorted(chunks[p], key=lambda i: (-attention[i], i))[: quota[p]]]
    step = (max(score.values(), default=1.0) or 1.0) / 2**17
    others = sorted((i for i in shown if i not in chosen), key=lambda i: (-round(score[i] / step), i))
    return filled([*chosen, *others][: min(num_keep, len(shown))], case, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_selector(HoloV(num_keep=NUM_KEEP), tmp_path_factory.mktemp("holov") / "holov.onnx")


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(HoloV(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = HoloV(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


def test_every_chunk_keeps_its_best_token_if_all_weigh_the_same() -> None:
    case = random_case(12, num_tokens=32)
    case.attention[:] = np.tile([0.25, 0.5, 0.25, 0.25], 8)
    case.tokens[:] = 1.0
    kept = HoloV(num_keep=8, num_chunks=8)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == list(range(1, 32, 4))


def test_quota_beyond_a_chunk_goes_to_the_best_of_the_others() -> None:
    case = random_case(13, num_tokens=32)
    case.attention[:] = np.linspace(0.001, 0.002, 32)
    case.attention[:4] = 100.0
    kept = HoloV(num_keep=9, num_chunks=8)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, 9, 8)
    assert kept[:4] == [0, 1, 2, 3]


def test_no_chunk_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_chunks: expected >= 1, got 0"):
        HoloV(num_keep=2, num_chunks=0)
