"""The fixed number of greedy steps, as a loop and as the body of a Scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.trio.selectors.token_graph import (
    assert_chosen,
    build_engine,
    export_once,
    export_selector,
    random_case,
)
from trio_edge.trio.methods import TOKEN_METHODS
from trio_edge.trio.selectors.tokens.cdpruner import CdPruner
from trio_edge.trio.selectors.tokens.divprune import DivPrune
from trio_edge.trio.selectors.tokens.eadp import Eadp
from trio_edge.trio.selectors.tokens.greedy import State, greedy_selection
from trio_edge.trio.selectors.tokens.holov import HoloV
from trio_edge.trio.selectors.tokens.scope import Scope
from trio_edge.trio.selectors.tokens.uniform import Uniform
from trio_edge.trio.selectors.tokens.visionzip import VisionZip

SELECTORS = (CdPruner, DivPrune, Eadp, Scope)
ALL = (*SELECTORS, HoloV, Uniform, VisionZip)


def fixed_gain(gain_N: Tensor, *, candidates: list[bool], num_keep: int) -> Any:
    def gain(_state: State, constants: State) -> Tensor:
        return constants[0]

    def update(state: State, _constants: State, _best: Tensor, number: Tensor) -> State:
        return (state[0] + number,)

    return greedy_selection(
        torch.tensor(candidates), torch.ones(len(candidates), dtype=torch.bool), num_keep=num_keep,
        state=(torch.zeros(1),), constants=(gain_N,), gain=gain, update=update,
    )  # fmt: skip


def test_gains_that_differ_by_rounding_only_are_ties() -> None:
    selection = fixed_gain(torch.tensor([1.0, 2.0, 2.000001, 2.0]), candidates=[True] * 4, num_keep=2)
    assert selection.kept_K.tolist() == [1, 2]
    assert selection.scores_N.tolist() == [0, 2, 1, 0]


def test_gains_that_differ_by_more_are_not() -> None:
    selection = fixed_gain(torch.tensor([1.0, 2.0, 2.0001, 2.0]), candidates=[True] * 4, num_keep=1)
    assert selection.kept_K.tolist() == [2]


def test_negative_gains_are_compared_too() -> None:
    selection = fixed_gain(torch.tensor([-9.0, -2.0, -3.0, -1.0]), candidates=[True] * 4, num_keep=2)
    assert selection.kept_K.tolist() == [1, 3]


def test_other_real_tokens_follow_in_order_when_no_candidate_is_left() -> None:
    selection = fixed_gain(torch.ones(5), candidates=[False, False, False, True, False], num_keep=3)
    assert selection.kept_K.tolist() == [0, 1, 3]


def test_gain_that_is_no_number_reads_nothing_beyond_the_end() -> None:
    selection = fixed_gain(torch.full((3,), float("nan")), candidates=[True] * 3, num_keep=2)
    assert len(set(selection.kept_K.tolist())) == 2


@pytest.mark.parametrize("selector", SELECTORS, ids=lambda selector: selector.__name__)
def test_half_precision_inputs_are_compared_in_float32(selector: Any) -> None:
    inputs = random_case(21).inputs(torch.float16)
    same = inputs._replace(**{
        name: value.to(torch.float32)
        for name, value in inputs._asdict().items()
        if value is not None and value.dtype == torch.float16
    })  # fmt: skip
    assert torch.equal(selector(num_keep=9)(inputs).kept_K, selector(num_keep=9)(same).kept_K)


@pytest.mark.parametrize("selector", ALL, ids=lambda selector: selector.__name__)
def test_selector_reads_only_what_it_asks_for(selector: Any) -> None:
    inputs = random_case(24).inputs(torch.float32)
    module = selector(num_keep=9)
    unasked: dict[str, None] = {}
    (row,) = (row for row in TOKEN_METHODS.values() if row.load() is selector)
    if not row.reads_features:
        unasked |= dict.fromkeys(("features_NF", "keys_NE", "attention_N"))
    if not row.reads_text:
        unasked |= dict.fromkeys(("text_TD", "num_text"))
    kept_K = module(inputs._replace(is_newline_N=None, **unasked)).kept_K
    assert torch.equal(kept_K, module(inputs).kept_K)
    assert not list(module.parameters())


# One each: an export takes about a second. Both are tried for every module, next to its own reference.
@pytest.mark.parametrize(
    ("selector", "num_keep"),
    list(zip(ALL, (1, 6, 6, 1, 6, 1, 6))),
    ids=[f"{selector.__name__}-{num_keep}" for selector, num_keep in zip(ALL, (1, 6, 6, 1, 6, 1, 6))],
)
def test_graph_of_a_fixed_size_keeps_one_token_or_all(selector: Any, num_keep: int) -> None:
    module = selector(num_keep=num_keep)
    path = export_once(module, num_tokens=6)
    for num_visual in (6, 5, 1, 0):
        case = random_case(22, num_tokens=6, num_visual=num_visual)
        expected = module(case.inputs(torch.float64)).kept_K.tolist()
        assert_chosen(module, path, case, expected)
        assert num_keep == 1 or expected == list(range(6))


@pytest.fixture(scope="module")
def graphs() -> dict[int, Path]:
    return {num_keep: export_once(DivPrune(num_keep=num_keep), num_tokens=15) for num_keep in (2, 15)}


def test_graph_holds_the_step_once_whatever_k(graphs: dict[int, Path]) -> None:
    bodies = [
        next(node for node in onnx.load(path).graph.node if node.op_type == "Scan").attribute[0].g
        for path in graphs.values()
    ]
    assert len(bodies[0].node) == len(bodies[1].node) < 60


def test_graph_carries_no_trace_of_the_machine_it_was_written_on(graphs: dict[int, Path]) -> None:
    model = ir.load(graphs[15])
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    assert all(not node.metadata_props and not node.doc_string for node in nodes)
    assert not model.functions
    assert str(Path(__file__).resolve().parents[3]).encode() not in graphs[15].read_bytes()


def test_selector_is_traced_without_memory_as_the_exporter_does(tmp_path: Path) -> None:
    with FakeTensorMode():
        path = export_selector(DivPrune(num_keep=6), tmp_path / "fake.onnx", num_tokens=15)
    case = random_case(23, num_tokens=15)
    selector = DivPrune(num_keep=6)
    assert_chosen(selector, path, case, selector(case.inputs(torch.float64)).kept_K.tolist())


def test_tensorrt_builds_hundreds_of_steps_over_a_large_picture() -> None:
    path = export_once(CdPruner(num_keep=320))
    assert path.stat().st_size < 200_000
    build_engine(path, num_tokens=2880)
