"""PyramidDrop equals its plain reference in torch and as a graph, and TensorRT builds it."""

from __future__ import annotations

import pytest
import torch

from tests.reference.stage_selectors import Rows, last_row_top_k
from tests.trio.decoder_layers import random_decoder
from tests.trio.selectors.stage_graph import CASES, Case, OnnxStage, agree, build, export_stage
from trio_edge.trio.selectors.stages.fastv import FastV
from trio_edge.trio.selectors.stages.pyramid_drop import PyramidDrop

KEEP = 12
DOUBLE = random_decoder("mistral", num_kv_heads=2, sliding_window=30).layer
SINGLE = random_decoder("mistral", num_kv_heads=2, sliding_window=30, dtype=torch.float32).layer


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxStage:
    path = tmp_path_factory.mktemp("pyramid") / "select.onnx"
    return OnnxStage(export_stage(PyramidDrop(SINGLE, num_keep=KEEP), path, CASES["random"]))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_torch_and_onnx_runtime_equal_the_reference(case: Case, graph: OnnxStage) -> None:
    rows = Rows(case.inputs())
    kept, scores = last_row_top_k(DOUBLE, rows.hidden, rows, KEEP)
    agree(PyramidDrop(DOUBLE, num_keep=KEEP)(case.inputs()), kept, scores)
    agree(PyramidDrop(SINGLE, num_keep=KEEP)(case.inputs(torch.float32)), kept, scores)
    agree(graph(case.inputs(torch.float32)), kept, scores)


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    inputs = CASES["random"].inputs()
    rows = Rows(inputs)
    agree(
        PyramidDrop(DOUBLE, num_keep=num_keep)(inputs), *last_row_top_k(DOUBLE, rows.hidden, rows, num_keep)
    )


def test_it_is_fastv_with_the_rows_that_enter_the_next_layer() -> None:
    inputs = CASES["random"].inputs()
    expected = FastV(DOUBLE, num_keep=KEEP)(inputs._replace(previous_SD=inputs.hidden_SD))
    got = PyramidDrop(DOUBLE, num_keep=KEEP)(inputs._replace(previous_SD=None, prompt=None))
    assert torch.equal(got.kept_K, expected.kept_K)


def test_tensorrt_builds_it(graph: OnnxStage) -> None:
    assert build(graph.path, CASES["random"]) > 0
