"""DART equals its plain reference in torch and as a graph, and TensorRT builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.stage_selectors import Rows, best, dart, keys_of
from tests.trio.decoder_layers import Decoder, random_decoder
from tests.trio.selectors.stage_graph import CASES, ROOM, Case, OnnxStage, agree, build, export_stage
from trio_edge.trio.selectors.stages.dart import Dart

KEEP = 17
DOUBLE = random_decoder("qwen2", num_kv_heads=2)
SINGLE = random_decoder("qwen2", num_kv_heads=2, dtype=torch.float32)


def _selector(decoder: Decoder, num_keep: int = KEEP) -> Dart:
    return Dart(decoder.layer, decoder.final_norm, num_keep=num_keep)


def _expected(case: Case, num_keep: int = KEEP) -> tuple[list[int], torch.Tensor]:
    return dart(DOUBLE.layer, DOUBLE.final_norm, Rows(case.inputs()), num_keep)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxStage:
    path = tmp_path_factory.mktemp("dart") / "select.onnx"
    return OnnxStage(export_stage(_selector(SINGLE), path, CASES["random"], several_sizes=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_torch_and_onnx_runtime_equal_the_reference(case: Case, graph: OnnxStage) -> None:
    kept, scores = _expected(case)
    agree(_selector(DOUBLE)(case.inputs()), kept, scores)
    agree(_selector(SINGLE)(case.inputs(torch.float32)), kept, scores)
    agree(graph(case.inputs(torch.float32)), kept, scores)


def test_a_graph_can_keep_a_single_token(tmp_path: Path) -> None:
    path = export_stage(_selector(SINGLE, 1), tmp_path / "select.onnx", CASES["random"])
    agree(OnnxStage(path)(CASES["random"].inputs(torch.float32)), *_expected(CASES["random"], 1))


def test_all_tokens_can_be_kept() -> None:
    for case in (CASES["random"], CASES["fewer tokens than rows"]):
        agree(_selector(SINGLE, 40)(case.inputs(torch.float32)), *_expected(case, 40))


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(30, 60), missing=st.integers(0, 60), num_text=st.integers(0, ROOM - 3),
    num_keep=st.integers(1, 30),
)  # fmt: skip
def test_any_sizes_equal_the_reference(num_rows: int, missing: int, num_text: int, num_keep: int) -> None:
    case = Case(num_rows=num_rows, num_visual=max(num_rows - missing, 0), num_text=num_text)
    kept, scores = _expected(case, num_keep)
    assert len(kept) == min(num_keep, case.num_visual)
    agree(_selector(DOUBLE, num_keep)(case.inputs()), kept, scores)


def test_the_four_tokens_of_the_largest_key_norm_always_stay() -> None:
    case = CASES["random"]
    rows = Rows(case.inputs())
    norms = keys_of(DOUBLE.layer, rows.previous, rows.cos, rows.sin).abs().sum((1, 2))[rows.visual]
    pivots = best(norms.tolist(), 4)
    selection = _selector(DOUBLE, 4)(case.inputs())
    assert selection.kept_K.tolist() == pivots
    assert set(pivots) < set(_selector(DOUBLE)(case.inputs()).kept_K.tolist())


def test_identical_tokens_are_taken_in_order_behind_the_pivots() -> None:
    selection = _selector(SINGLE)(CASES["identical tokens"].inputs(torch.float32))
    pivots = (selection.scores_N == 1).nonzero().flatten().tolist()
    others = [token for token in range(40) if token not in pivots][: KEEP - 4]
    assert selection.kept_K.tolist() == sorted(pivots + others)


def test_tensorrt_builds_it_for_several_lengths(graph: OnnxStage) -> None:
    assert build(graph.path, CASES["random"]) > 0


def test_tensorrt_builds_it_in_half_precision(tmp_path: Path) -> None:
    decoder = random_decoder(num_kv_heads=4, dtype=torch.float16)
    path = export_stage(_selector(decoder), tmp_path / "select.onnx", CASES["random"])
    assert build(path, CASES["random"]) > 0
