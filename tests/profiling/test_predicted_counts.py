"""Counted work of graphs: the same sums as ``trio_edge.trio.cost.flops``, and the products that the exported graphs really have."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from tests.bundles import export
from tests.matmul_flops import example_feeds, matmul_flops
from tests.schedules import schedule_for, schedule_of
from tests.spec.test_selectors_through_bundles import STAGE_METHODS
from trio_edge.export.check.fit import FitImage, FitInputs, estimate
from trio_edge.export.checkpoints.checkpoint import ALIASES
from trio_edge.profiling.predict.answer import memory_of
from trio_edge.profiling.predict.models import MODELS
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.devices.memory import estimate as loading_estimate
from trio_edge.trio.cost.bundle_work import counted, graph_work
from trio_edge.trio.cost.memory import pixel_bytes_of, tiles_of
from trio_edge.trio.cost.work import (
    counted_work,
    head_work,
    range_work,
    tiles_and_patches,
    tower_weights,
    vision_work,
)

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_SIZE = (672, 672)


def test_models_without_a_bundle_are_those_that_can_be_exported() -> None:
    assert set(MODELS) == set(ALIASES) - {"tiny"}


@pytest.mark.parametrize("name", MODELS)
def test_vision_decoder_and_head_have_the_flops_of_the_written_formulas(name: str) -> None:
    model = MODELS[name]
    tower, decoder, sizes = model.vision, model.decoder, model.images.sizes(*IMAGE_SIZE)
    assert tower is not None
    tiles, P = tiles_and_patches(tower, sizes)
    rows, width = sizes["N"] + 40, tower.hidden_size
    Q, K, D = (
        decoder.num_heads * decoder.head_size,
        decoder.num_kv_heads * decoder.head_size,
        decoder.hidden_size,
    )
    mlp, projected_queries = 3 * decoder.intermediate_size, 2 * Q if decoder.has_attention_gate else Q
    layer = 2 * rows * D * (projected_queries + Q + 2 * K + mlp) + 4 * rows**2 * Q
    last = max({*range(decoder.num_layers)} - {*decoder.linear_layers})
    assert range_work(decoder, layers=(last,) * 3, rows=rows).flops == 3 * layer
    if (linear := decoder.linear) is not None and linear.width:
        wanted = 2 * rows * D * (4 * linear.width + mlp)
        assert range_work(decoder, layers=linear.layers[:1], rows=rows).flops == wanted
    elif linear is not None:
        key, value, chunk = linear.key_size, linear.value_size, 64
        keys, values = linear.num_key_heads * key, linear.num_value_heads * value
        products = 2 * rows * D * (2 * keys + values + values + 2 * linear.num_value_heads + values + mlp)
        rule = 2 * rows * (3 * key * value + chunk * (3 * key + 2 * value + 2 * 6 * chunk))
        wanted = 3 * (products + linear.num_value_heads * rule)
        assert range_work(decoder, layers=range(3), rows=rows).flops == wanted
    assert head_work(decoder).flops == 2 * D * decoder.vocab_size
    merged, inner = tower.num_merged_layers, tower.intermediate_size
    layers = tower.num_layers - merged
    full = layers if tower.patches_per_window is None else tower.num_full_layers
    attended = full * P + (layers - full) * (tower.patches_per_window or 0)
    weights = 4 * width**2 + tower.mlp_matrices * width * tower.intermediate_size
    projected = sizes[
        "N"
    ]  # InternVL's; the others' newlines are none, and Qwen's patches are four to a token
    if tower.projected_per_tile is not None:
        projected = tiles * tower.projected_per_tile
    projector = 2 * projected * tower.projector_weights
    per_tile = layers * 2 * P * weights + 4 * P * attended * width
    if merged:  # attention in windows of four patches, an MLP of four times the widths, and layers with a quarter of the patches
        per_tile += 2 * P * 4 * width**2 + 4 * P * 4 * width + 2 * (P // 4) * (4 + 1) * 4 * width * inner
        per_tile += merged * (2 * (P // 4) * weights + 4 * (P // 4) ** 2 * width)
    assert vision_work(tower, sizes).flops == pytest.approx(tiles * per_tile + projector, rel=1e-12)


@pytest.mark.parametrize("profile", ["first", "decode"])
@pytest.mark.parametrize("role", ["prefix", "segment", "suffix", "select", "head"])
def test_graphs_of_a_bundle_have_the_products_that_are_counted(
    role: str, profile: str, reduced_bundle: Path
) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    graph = next(graph for graph in manifest.graphs if graph.role == role)
    for part in graph.split():
        chosen = part.profiles[0 if profile == "first" else -1]
        products = matmul_flops(reduced_bundle / part.file, example_feeds(part, chosen))
        assert graph_work(manifest, graph, chosen).flops == products


def test_a_vision_graph_has_the_products_that_are_counted(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    graph = manifest.graph("vision")
    for profile in graph.profiles:
        products = matmul_flops(reduced_bundle / graph.file, example_feeds(graph, profile))
        assert graph_work(manifest, graph, profile).flops == pytest.approx(products, rel=1e-9)


@pytest.mark.parametrize("method", STAGE_METHODS)
def test_stages_of_other_methods_have_the_products_that_are_counted(method: str, checkpoint: Path) -> None:
    bundle = export(checkpoint, schedule=STAGE_METHODS[method])
    manifest = open_bundle(bundle).manifest
    for graph in manifest.selects:
        products = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
        assert graph_work(manifest, graph, graph.profiles[-1]).flops == pytest.approx(products, rel=1e-9)


def test_a_selection_before_the_decoder_has_the_products_that_are_counted(checkpoint: Path) -> None:
    bundle = export(checkpoint, token_method="visionzip", token_keep=15)
    manifest = open_bundle(bundle).manifest
    graph = manifest.graph("reduce")
    products = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
    assert graph_work(manifest, graph, graph.profiles[-1]).flops == pytest.approx(products, rel=1e-9)


def test_a_bundle_is_predicted_at_another_keep_with_its_own_method(checkpoint: Path) -> None:
    manifest = open_bundle(export(checkpoint, schedule=STAGE_METHODS["fastv"])).manifest
    setting = plan_for(manifest=manifest, keep="50%")
    assert setting.schedule == schedule_for(0.5, method="fastv", num_layers=3, num_visual=setting.sizes["N"])
    assert setting.schedule != manifest.schedule


def test_a_run_moves_at_least_the_weights(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    for graph in manifest.graphs:
        assert graph_work(manifest, graph, graph.profiles[-1]).moved_bytes > graph.weight_bytes


def test_a_selection_that_is_only_known_as_flops_moves_its_weights_once(checkpoint: Path) -> None:
    manifest = open_bundle(export(checkpoint, schedule=STAGE_METHODS["fastv"])).manifest
    graph = manifest.selects[0]
    (product,) = counted(manifest, graph, graph.profiles[-1]).products
    moved = graph_work(manifest, graph, graph.profiles[-1]).moved_bytes
    assert moved == pytest.approx(graph.weight_bytes + 4 * product.row_elements)


def test_work_that_is_only_known_as_flops_keeps_them() -> None:
    assert counted_work(123456.0, rows=7).flops == pytest.approx(123456.0)


@pytest.mark.parametrize("keep", ["100%", "11.1%"])
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_what_the_exporter_estimates(name: str, keep: str) -> None:
    model = MODELS[name]
    assert model.vision is not None
    if keep == "11.1%" and model.decoder.linear is not None and model.decoder.num_layers <= 24:
        keep = "22.2%"  # the first layers, which see all tokens, are more than a ninth
    setting = plan_for(model=name, keep=keep, num_text=256, num_new=256)
    pixel_bytes = pixel_bytes_of(model.images.to_dict(), setting.sizes)
    tiles = tiles_of(model.vision, setting.sizes)
    inputs = FitInputs(
        decoder=model.decoder, vision_params=tower_weights(model.vision), schedule=setting.schedule, max_text=256,
        image=FitImage(num_visual=setting.sizes["N"], tiles=tiles, pixel_bytes=pixel_bytes),
        max_new_tokens=256,
    )  # fmt: skip
    theirs = estimate(inputs, usable_bytes=0)
    ours = memory_of(setting, usable=0)
    assert ours.kv_caches == theirs.parts["KV caches"]
    assert ours.buffers == theirs.parts["buffers"]
    assert ours.workspace <= theirs.parts["workspace"]
    weights = sum(count for name, count in theirs.parts.items() if name.endswith("weights"))
    assert ours.weights == pytest.approx(weights, rel=0.02)


KINDS: dict[str, dict[str, Any]] = {
    "keep-all": {},
    "trio": {"schedule": schedule_of("1:20,5:12,8:4")},
    "fastv": {"schedule": Schedule(stages=(Stage(layer=2, keep=20),), method="fastv")},
    "before the decoder": {"token_method": "divprune", "token_keep": 40},
    "two images": {"schedule": schedule_of("1:40,5:12"), "max_images": 2},
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_without_a_bundle_is_nearly_what_loading_the_bundle_takes(kind: str) -> None:
    """The bound is 3 % of the whole: norms, biases, and results of selections are all that the plan leaves out."""
    manifest = open_bundle(export("tiny", **KINDS[kind])).manifest
    setting = plan_for(manifest=manifest, num_new=1)
    exact = memory_of(setting, usable=0)
    weight_bytes = sum(graph.weight_bytes for graph in manifest.graphs)
    assert setting.memory == loading_estimate(manifest, manifest.graphs, weight_bytes=weight_bytes)
    assert exact.total == sum(setting.memory.values())
    planned = memory_of(dataclasses.replace(setting, memory=None), usable=0)
    assert planned.kv_caches == exact.kv_caches == manifest.kv_bytes
    assert planned.workspace == exact.workspace
    assert planned.weights == pytest.approx(exact.weights, rel=0.02)
    assert 0.9 * exact.buffers < planned.buffers < exact.buffers
    assert 0.97 * exact.total < planned.total < exact.total


@pytest.mark.parametrize(
    "wish",
    [{"keep": "50%"}, {"precision": "int4"}, {"image_size": (96, 96)}, {"num_new": 99}, {"num_images": 2}],
)
def test_another_bundle_is_not_counted_as_this_one(wish: dict[str, Any], reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    assert plan_for(manifest=manifest).memory is not None
    assert plan_for(manifest=manifest, **wish).memory is None


@pytest.mark.parametrize("keep", ["50%", "100%"])
def test_a_keep_above_what_enters_the_decoder_is_refused_as_by_the_exporter(
    keep: str, checkpoint: Path
) -> None:
    manifest = open_bundle(export(checkpoint, token_method="visionzip", token_keep=15)).manifest
    with pytest.raises(ScheduleError, match=r"--keep: expected at most 29\.4%, which is what enters"):
        plan_for(manifest=manifest, keep=keep)
    assert plan_for(manifest=manifest, keep="all").schedule.stages == ()


def test_a_keep_gives_the_exporters_stages() -> None:
    setting = plan_for(model="llava-1.5-7b", keep="11.1%")
    assert setting.schedule == schedule_of("1:92,10:54,15:22")
    assert setting.visual_rows == (576, 92, 54, 22)
