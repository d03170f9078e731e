"""SCOPE against plain loops, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

from pathlib import Path

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
from trio_edge.trio.selectors.scope import Scope


def reference(case: Case, num_keep: int = NUM_KEEP, exponent: float = 1.0) -> list[int]:
    shown = case.shown
    cover = dict.fromkeys(shown, 0.0)
    chosen: list[int] = []
    while len(chosen) < min(num_keep, len(shown)):
        gains = {}
        for i in shown:
            if i not in chosen:
                new = [max(0.0, cosine(case.features[i], case.features[j]) - cover[j]) for j in shown]
                gains[i] = float(case.attention[i]) ** exponent * sum(new)
        best = first_best(gains)
        chosen.append(best)
        for j in shown:
            cover[j] = max(cover[j], cosine(case.features[best], case.features[j]))
    return filled(chosen, case, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_selector(Scope(num_keep=NUM_KEEP), tmp_path_factory.mktemp("scope") / "scope.onnx")


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(Scope(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = Scope(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_exponent_of_zero_leaves_the_saliency_out() -> None:
    case = random_case(12)
    kept = Scope(num_keep=5, exponent=0.0)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, 5, exponent=0.0)


def test_scores_tell_the_order_of_choice() -> None:
    inputs = random_case(13).inputs(torch.float64)
    scores = Scope(num_keep=4)(inputs).scores_N
    assert sorted(scores[scores > 0].tolist()) == [1, 2, 3, 4]
    assert int(scores.argmax()) == Scope(num_keep=1)(inputs).kept_K.item()


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


def test_negative_exponent_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"exponent: expected >= 0, got -1"):
        Scope(num_keep=2, exponent=-1.0)
