"""DivPrune against plain loops, as a graph on ONNX Runtime, and as a TensorRT engine."""

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
from trio_edge.trio.selectors.divprune import DivPrune


def reference(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    real = range(case.num_visual)
    distance = [[1.0 - cosine(case.tokens[i], case.tokens[j]) for j in real] for i in real]
    chosen: list[int] = []
    while len(chosen) < min(num_keep, case.num_visual):
        others = chosen or list(real)
        gains = {
            i: min((distance[i][j] for j in others if j != i), default=4.0) for i in real if i not in chosen
        }
        chosen.append(first_best(gains))
    return filled(chosen, case, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_selector(DivPrune(num_keep=NUM_KEEP), tmp_path_factory.mktemp("divprune") / "divprune.onnx")


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(DivPrune(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = DivPrune(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


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
