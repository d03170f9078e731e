"""EVS: the tokens that changed most, in the module, as a graph on ONNX Runtime, and as a TensorRT engine."""

from __future__ import annotations

from dataclasses import replace
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
    export_once,
    findings,
    random_case,
    run_graph,
)
from trio_edge.trio.selectors.tokens.evs import Evs
from trio_edge.trio.selectors.tokens.uniform import Uniform


def reference(case: Case, num_keep: int = NUM_KEEP) -> list[int]:
    """Plain loops in float64; of changes that are equal but for rounding the lower index comes first."""
    if case.num_visual <= num_keep:
        return list(range(num_keep))
    changes = {i: 1.0 - cosine(case.tokens[i], case.previous[i]) for i in range(case.num_visual)}
    order = sorted(changes, key=lambda i: (-round(changes[i], 5), i))
    return sorted(order[:num_keep])


@pytest.fixture(scope="module")
def graph() -> Path:
    return export_once(Evs(num_keep=NUM_KEEP))


@pytest.mark.parametrize("name", CASES)
def test_module_and_graph_choose_what_plain_loops_choose(name: str, graph: Path) -> None:
    case = CASES[name]
    assert_chosen(Evs(num_keep=NUM_KEEP), graph, case, reference(case))


@pytest.mark.parametrize("name", CASES)
def test_the_first_pair_of_frames_and_images_keep_evenly_spaced_tokens(name: str, graph: Path) -> None:
    case = replace(CASES[name], has_previous=0, previous=np.full_like(CASES[name].previous, np.nan))
    expected = Uniform(num_keep=NUM_KEEP)(case.inputs(torch.float64)).kept_K.tolist()
    assert_chosen(Evs(num_keep=NUM_KEEP), graph, case, expected)


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    case = random_case(11, num_visual=38)
    kept = Evs(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


def test_tokens_that_did_not_change_are_dropped_whatever_their_length(graph: Path) -> None:
    case = random_case(12)
    changed = [3, 4, 9, 10, 11, 17, 18, 22, 30, 31, 38, 39]
    previous = case.tokens * 3.0
    previous[changed] *= -1.0
    kept, scores, *_ = run_graph(graph, replace(case, previous=previous))
    assert kept.tolist() == changed
    np.testing.assert_allclose(scores[changed], 2.0, rtol=1e-5)


def test_graph_passes_the_static_check_and_tensorrt_builds_it(graph: Path) -> None:
    assert findings(graph) == []
    build_engine(graph)
