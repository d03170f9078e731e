"""SparseVLM equals its plain reference in torch and as a graph, keeps the published counts, and TensorRT builds it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.matmul_flops import matmul_flops
from tests.reference.stage_selectors import Rows, density_peaks, raters, sparse_vlm, split_by_search
from tests.trio.decoder_layers import HEAD_SIZE, HEADS, HIDDEN, VOCAB, random_decoder
from tests.trio.selectors.stage_graph import (
    CASES,
    NAMES,
    ROOM,
    Case,
    OnnxStage,
    agree,
    build,
    export_stage,
    flat,
)
from trio_edge.runtime.bundle.manifest import Dimensions
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.selections import StageSizes
from trio_edge.trio.methods import stage_method
from trio_edge.trio.selectors.stages import sparse_vlm as module
from trio_edge.trio.selectors.stages.sparse_vlm import SparseVlm, rater_weights, split_of

KEEP = 30
SHAPE = Dimensions(
    num_layers=1,
    hidden_size=HIDDEN,
    num_heads=HEADS,
    num_kv_heads=2,
    head_size=HEAD_SIZE,
    intermediate_size=112,
    vocab_size=VOCAB,
)
SEVERAL_CLUSTERS = {
    name: replace(case, num_rows=150, num_visual=case.num_visual * (15 if case.num_visual > 12 else 4) // 4)
    for name, case in CASES.items()
}
SEVERAL_CLUSTERS["two tokens more than are kept"] = Case(num_rows=150, num_visual=KEEP + 2)
DOUBLE = random_decoder("qwen2", num_kv_heads=2).layer
SINGLE = random_decoder("qwen2", num_kv_heads=2, dtype=torch.float32).layer
PUBLISHED = [
    (576, 309, 300), (309, 204, 200), (204, 113, 110),
    (576, 312, 303), (312, 117, 110), (117, 39, 36),
    (576, 249, 238), (249, 55, 48), (55, 27, 26),
    (576, 82, 66), (82, 32, 30), (32, 18, 17),
]  # fmt: skip


def _expected(case: Case, num_keep: int = KEEP) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    return sparse_vlm(DOUBLE, Rows(case.inputs()), num_keep)


@pytest.fixture(scope="module", params=[False, True], ids=["one picture size", "several picture sizes"])
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OnnxStage:
    path = tmp_path_factory.mktemp("sparse") / "select.onnx"
    selector, case = SparseVlm(SINGLE, num_keep=KEEP), SEVERAL_CLUSTERS["random"]
    return OnnxStage(export_stage(selector, path, case, several_sizes=request.param))


@pytest.mark.parametrize("case", SEVERAL_CLUSTERS.values(), ids=SEVERAL_CLUSTERS.keys())
def test_torch_equals_the_reference(case: Case) -> None:
    expected = _expected(case)
    agree(SparseVlm(DOUBLE, num_keep=KEEP)(case.inputs()), *expected)
    agree(SparseVlm(SINGLE, num_keep=KEEP)(case.inputs(torch.float32)), *expected)


def test_onnx_runtime_equals_the_reference(graph: OnnxStage) -> None:
    for case in SEVERAL_CLUSTERS.values():
        agree(graph(case.inputs(torch.float32)), *_expected(case))


def test_the_graph_computes_the_products_that_are_counted(graph: OnnxStage) -> None:
    """A graph for several picture sizes clusters all tokens, masked; sums of merged rows are no part of the selector."""
    inputs = SEVERAL_CLUSTERS["random"].inputs(torch.float32)
    feeds = {name: value.numpy() for name, value in zip(NAMES, flat(inputs))}
    shapes = {value.name: value.shape for value in graph.session.get_inputs()}
    one_size = isinstance(shapes["visual_rows"][0], int)
    prompt_visual = len(feeds["prompt_embeds"]) - ROOM
    sizes = StageSizes(150, KEEP, num_text=ROOM, prompt_visual=prompt_visual, one_size=one_size)
    counted = (
        stage_method("sparsevlm").flops(SHAPE, Schedule(method="sparsevlm"), sizes) - 2 * KEEP * 150 * HIDDEN
    )
    assert counted == matmul_flops(graph.path, feeds)


@pytest.mark.parametrize("num_keep", [1, 40])
def test_one_token_and_all_tokens_can_be_kept(num_keep: int) -> None:
    for case in (CASES["random"], CASES["fewer tokens than rows"]):
        kept, scores, _ = _expected(case, num_keep)
        selection = SparseVlm(SINGLE, num_keep=num_keep)(case.inputs(torch.float32))
        agree(selection, kept, scores)
        assert selection.weights_KN is None


@settings(deadline=None, max_examples=25)
@given(
    num_rows=st.integers(30, 90), missing=st.integers(0, 90), num_text=st.integers(0, ROOM - 3),
    num_keep=st.integers(1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes_equal_the_reference(
    num_rows: int, missing: int, num_text: int, num_keep: int, seed: int
) -> None:
    case = Case(num_rows=num_rows, num_visual=max(num_rows - missing, 0), num_text=num_text)
    inputs = case.inputs(seed=seed)
    kept, scores, weights = sparse_vlm(DOUBLE, Rows(inputs), num_keep)
    assert len(kept) == min(num_keep, case.num_visual)
    merges = num_keep not in (1, num_rows)
    agree(SparseVlm(DOUBLE, num_keep=num_keep)(inputs), kept, scores, weights if merges else None)


@pytest.mark.parametrize(("num_visual", "num_keep", "kept"), PUBLISHED)
def test_the_split_of_the_rows_is_the_published_one(num_visual: int, num_keep: int, kept: int) -> None:
    assert split_of(num_visual, num_keep)[0] == kept


@given(num_visual=st.integers(1, 3000), num_keep=st.integers(1, 1500))
def test_the_split_is_the_searched_one_in_integers_and_in_the_graph(num_visual: int, num_keep: int) -> None:
    kept, merged, pooled = split_of(num_visual, num_keep)
    in_graph = module._split(torch.tensor([float(num_visual)]), num_keep)
    if num_visual > num_keep:
        assert kept == split_by_search(num_visual, num_keep)
        assert kept + merged == num_keep
        assert merged <= pooled == int(0.3 * (num_visual - kept)) + 1 <= num_visual - kept
    assert [int(value) for value in in_graph] == [kept, merged, pooled]


def test_raters_are_the_words_most_like_the_picture() -> None:
    case = CASES["random"]
    weights = rater_weights(case.inputs())
    chosen = raters(Rows(case.inputs()))
    assert 0 < len(chosen) < case.num_text
    assert weights.nonzero().flatten().tolist() == chosen
    torch.testing.assert_close(weights[chosen], torch.full((len(chosen),), 1 / len(chosen)))


def test_words_that_are_all_alike_are_all_raters() -> None:
    inputs = CASES["random"].inputs(torch.float32)
    assert inputs.prompt is not None
    embeds = inputs.prompt.embeds_FD.clone()
    embeds[3 + 45 :] = embeds[3 + 45]
    weights = rater_weights(inputs._replace(prompt=inputs.prompt._replace(embeds_FD=embeds)))
    torch.testing.assert_close(weights, torch.tensor([1 / 9] * 9 + [0.0] * 15))


def test_points_in_clear_groups_become_these_clusters() -> None:
    torch.manual_seed(0)
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
    points = torch.eye(16)[group] * 20 + 0.1 * torch.randn(12, 16)
    centre, owner = module.density_peaks(
        points, torch.ones(12, dtype=torch.bool), torch.tensor([3.0]), max_clusters=5
    )
    assert centre.sum() == 3
    assert torch.equal(group[owner], group)
    clusters = density_peaks(points.double(), 3)
    assert [owner[cluster].unique().tolist() for cluster in clusters] == [
        [cluster[0]] for cluster in clusters
    ]


def test_far_points_do_not_lose_their_density() -> None:
    """exp(-distance²) is 0 for every point here; in logarithms the closest pair stays the densest."""
    torch.manual_seed(1)
    points = 1e3 * torch.randn(12, 16)
    centre, _ = module.density_peaks(
        points, torch.ones(12, dtype=torch.bool), torch.tensor([2.0]), max_clusters=2
    )
    distances = torch.cdist(points, points) + 1e9 * torch.eye(12)
    assert centre.nonzero().flatten().tolist() == sorted(divmod(int(distances.argmin()), 12))


def test_tensorrt_builds_it_for_several_lengths(graph: OnnxStage) -> None:
    assert build(graph.path, SEVERAL_CLUSTERS["random"]) > 0


def test_tensorrt_builds_it_in_half_precision(tmp_path: Path) -> None:
    layer = random_decoder(num_kv_heads=4, dtype=torch.float16).layer
    path = export_stage(SparseVlm(layer, num_keep=KEEP), tmp_path / "select.onnx", SEVERAL_CLUSTERS["random"])
    assert build(path, SEVERAL_CLUSTERS["random"]) > 0
