"""FastV equals its plain reference in torch and as a graph, and TensorRT builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.stage_selectors import Rows, last_row_top_k
from tests.trio.decoder_layers import random_decoder
from tests.trio.selectors.stage_graph import CASES, ROOM, Case, OnnxStage, agree, build, export_stage
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.selectors.stages.fastv import FastV

KEEP = 12
DOUBLE = random_decoder("llama", num_kv_heads=2).layer
SINGLE = random_decoder("llama", num_kv_heads=2, dtype=torch.float32).layer


def _expected(case: Case, num_keep: int) -> tuple[list[int], torch.Tensor]:
    rows = Rows(case.inputs())
    return last_row_top_k(DOUBLE, rows.previous, rows, num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxStage:
    path = tmp_path_factory.mktemp("fastv") / "select.onnx"
    selector = FastV(SINGLE, num_keep=KEEP)
    return OnnxStage(export_stage(selector, path, CASES["random"], several_sizes=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_torch_and_onnx_runtime_equal_the_reference(case: Case, graph: OnnxStage) -> None:
    kept, scores = _expected(case, KEEP)
    agree(FastV(DOUBLE, num_keep=KEEP)(case.inputs()), kept, scores)
    agree(FastV(SINGLE, num_keep=KEEP)(case.inputs(torch.float32)), kept, scores)
    agree(graph(case.inputs(torch.float32)), kept, scores)


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int, tmp_path: Path) -> None:
    path = export_stage(FastV(SINGLE, num_keep=num_keep), tmp_path / "select.onnx", CASES["random"])
    for case in (CASES["random"], CASES["fewer tokens than rows"]):
        agree(OnnxStage(path)(case.inputs(torch.float32)), *_expected(case, num_keep))


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(12, 50), missing=st.integers(0, 50), num_text=st.integers(0, ROOM - 3),
    num_keep=st.integers(1, 12),
)  # fmt: skip
def test_any_sizes_equal_the_reference(num_rows: int, missing: int, num_text: int, num_keep: int) -> None:
    case = Case(num_rows=num_rows, num_visual=max(num_rows - missing, 0), num_text=num_text)
    agree(FastV(DOUBLE, num_keep=num_keep)(case.inputs()), *_expected(case, num_keep))


def test_equal_scores_keep_the_first_tokens() -> None:
    selection = FastV(DOUBLE, num_keep=KEEP)(CASES["equal scores everywhere"].inputs())
    assert selection.kept_K.tolist() == list(range(KEEP))


def test_only_the_layer_before_is_looked_at() -> None:
    inputs = CASES["random"].inputs()
    selector = FastV(DOUBLE, num_keep=KEEP)
    other = inputs._replace(hidden_SD=torch.randn_like(inputs.hidden_SD), prompt=None)
    assert torch.equal(selector(inputs).kept_K, selector(other).kept_K)


def test_parameters_are_the_layers_own() -> None:
    own = {id(parameter) for parameter in SINGLE.parameters()}
    assert {id(parameter) for parameter in FastV(SINGLE, num_keep=1).parameters()} == own


@pytest.mark.parametrize(
    ("num_keep", "message"), [(0, "expected >= 1, got 0"), (41, "expected <= 40 .*, got 41")]
)
def test_impossible_numbers_of_tokens_are_refused(num_keep: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        FastV(DOUBLE, num_keep=num_keep)(CASES["random"].inputs())


def test_tensorrt_builds_it_for_several_lengths(graph: OnnxStage) -> None:
    assert build(graph.path, CASES["random"]) > 0


def test_tensorrt_builds_it_in_half_precision(tmp_path: Path) -> None:
    layer = random_decoder(num_kv_heads=4, dtype=torch.float16).layer
    path = export_stage(FastV(layer, num_keep=KEEP), tmp_path / "select.onnx", CASES["random"])
    assert build(path, CASES["random"]) > 0
