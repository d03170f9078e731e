"""VisionZip against plain loops, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trio.selectors.token_graph import (
    CASES,
    NUM_KEEP,
    Array,
    Case,
    assert_chosen,
    build_engine,
    cosine,
    export_once,
    filled,
    findings,
    random_case,
    run_graph,
)
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.tokens.visionzip import VisionZip


def reference(
    case: Case, num_keep: int = NUM_KEEP, num_contextual: int | None = None
) -> tuple[list[int], Array]:
    num_contextual = num_keep * 10 // 64 if num_contextual is None else num_contextual
    num_dominant = num_keep - num_contextual
    by_attention = sorted(case.shown, key=lambda i: (-case.attention[i], i))
    dominant = sorted(by_attention[:num_dominant])
    rest = [i for i in case.shown if i not in dominant]
    if len(rest) <= num_contextual:
        kept = filled(case.shown, case, num_keep)
        return kept, np.eye(len(case.tokens))[kept]
    stride = max(1, len(rest) // max(num_contextual, 1))
    targets = rest[::stride][:num_contextual]
    kept = dominant + targets
    weights = np.eye(len(case.tokens))[kept]
    for slot, target in enumerate(targets):
        taken = [i for i in rest if i not in targets and closest(case, i, targets) == target]
        weights[num_dominant + slot, taken] = 1 / max(len(taken), 1)
    return kept, weights


def closest(case: Case, token: int, targets: list[int]) -> int:
    return max(targets, key=lambda target: (cosine(case.keys[token], case.keys[target]), -target))


@pytest.fixture(scope="module")
def graph() -> Path:
    return export_once(VisionZip(num_keep=NUM_KEEP, num_contextual=3))


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_and_merge_what_plain_loops_do(name: str, graph: Path) -> None:
    case = CASES[name]
    kept, weights = reference(case, NUM_KEEP, 3)
    selector = VisionZip(num_keep=NUM_KEEP, num_contextual=3)
    assert_chosen(selector, graph, case, kept)
    np.testing.assert_allclose(selector(case.inputs(torch.float64)).weights_KN, weights, rtol=1e-6)
    np.testing.assert_allclose(run_graph(graph, case)[3], weights, rtol=1e-6)


@pytest.mark.parametrize("num_keep", [1, 40])
@pytest.mark.parametrize("num_contextual", [None, 0])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int, num_contextual: int | None) -> None:
    case = random_case(11, num_visual=38)
    selection = VisionZip(num_keep=num_keep, num_contextual=num_contextual)(case.inputs(torch.float64))
    assert selection.kept_K.tolist() == reference(case, num_keep, num_contextual)[0]


@pytest.mark.parametrize(("num_keep", "num_contextual"), [(64, 10), (128, 20), (192, 30)])
def test_default_share_of_contextual_tokens_is_the_papers(num_keep: int, num_contextual: int) -> None:
    assert VisionZip(num_keep=num_keep).num_contextual == num_contextual


def test_without_contextual_tokens_nothing_is_merged() -> None:
    assert VisionZip(num_keep=5)(random_case().inputs(torch.float32)).weights_KN is None


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


def test_no_dominant_token_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"num_contextual: expected 0\.\.3, got 4"):
        VisionZip(num_keep=4, num_contextual=4)
