"""Evenly spaced tokens, in the module, as a graph on ONNX Runtime, and as a TensorRT engine."""

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
    export_once,
    findings,
    random_case,
)
from trio_edge.calibration.evaluate.answering import evenly_spaced
from trio_edge.trio.selectors.tokens.uniform import Uniform


def reference(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    if case.num_visual <= num_keep:
        return list(range(num_keep))
    return evenly_spaced(case.num_visual, num_keep).tolist()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def graph() -> Path:
    return export_once(Uniform(num_keep=NUM_KEEP))


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(Uniform(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = Uniform(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)


@pytest.mark.parametrize("num_keep", [320, 979])
def test_large_pictures_are_divided_exactly(num_keep: int) -> None:
    case = random_case(num_tokens=2928)
    kept = Uniform(num_keep=num_keep)(case.inputs(torch.float32)).kept_K.tolist()
    assert kept == [(2 * k + 1) * 2928 // (2 * num_keep) for k in range(num_keep)]
