"""Selectors before the decoder against plain loops, as graphs on ONNX Runtime, and as TensorRT engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.reference import token_selectors as plain
from tests.trio.selectors.token_graph import (
    CASES,
    NUM_KEEP,
    assert_chosen,
    build_engine,
    export_once,
    findings,
    random_case,
)
from trio_edge.trio.selectors.tokens.cdpruner import CdPruner
from trio_edge.trio.selectors.tokens.divprune import DivPrune
from trio_edge.trio.selectors.tokens.eadp import Eadp
from trio_edge.trio.selectors.tokens.holov import HoloV
from trio_edge.trio.selectors.tokens.scope import Scope

if TYPE_CHECKING:
    from collections.abc import Callable

SELECTORS: dict[str, tuple[Any, Callable[..., list[int]]]] = {
    "cdpruner": (CdPruner, plain.cdpruner),
    "divprune": (DivPrune, plain.divprune),
    "eadp": (Eadp, plain.eadp),
    "holov": (HoloV, plain.holov),
    "scope": (Scope, plain.scope),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", SELECTORS)
def test_module_and_graph_choose_what_plain_loops_choose(method: str, name: str) -> None:
    selector_class, reference = SELECTORS[method]
    selector, case = selector_class(num_keep=NUM_KEEP), CASES[name]
    assert_chosen(selector, export_once(selector), case, reference(case))


@pytest.mark.parametrize("num_keep", [1, 40])
@pytest.mark.parametrize("method", SELECTORS)
def test_one_token_and_all_tokens_can_be_kept(method: str, num_keep: int) -> None:
    selector_class, reference = SELECTORS[method]
    case = random_case(11, num_visual=38)
    kept = selector_class(num_keep=num_keep)(case.inputs(torch.float64)).kept_K.tolist()
    assert kept == reference(case, num_keep)


@pytest.mark.parametrize("method", SELECTORS)
def test_graph_passes_the_static_check_and_tensorrt_builds_it(method: str) -> None:
    graph = export_once(SELECTORS[method][0](num_keep=NUM_KEEP))
    assert findings(graph) == []
    build_engine(graph)
