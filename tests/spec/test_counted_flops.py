"""Every method's own FLOPs, counted by formula, against the matrix products of the graph that was exported for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.bundles import export
from tests.matmul_flops import example_feeds, matmul_flops
from tests.spec.test_selectors_through_bundles import STAGE_METHODS
from tests.trio.selectors.token_graph import NUM_KEEP, D, E, F, T, export_once, random_case
from trio_edge.calibration.evaluate.answer_cost import prefill_flops
from trio_edge.export.plan import token_selector
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.graph_io import gradient_graph, is_probe
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.cost.bundle_work import graph_work, input_widths
from trio_edge.trio.cost.selections import StageSizes, TokenSizes
from trio_edge.trio.methods import TOKEN_METHODS, stage_method

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest

SCHEDULES = {"trio": Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6))), **STAGE_METHODS}
WIDTHS = {"visual_tokens": D, "features": F, "keys": E}


@pytest.mark.parametrize("method", SCHEDULES)
def test_stages_compute_the_products_that_the_formula_counts(method: str, checkpoint: Path) -> None:
    schedule = SCHEDULES[method]
    bundle = export(checkpoint, schedule=schedule)
    manifest = open_bundle(bundle).manifest
    for stage, graph in zip(schedule.stages, manifest.selects, strict=True):
        sizes = graph.profiles[-1].sizes
        num_text = sizes["S"] - sizes["N"]
        counted = StageSizes(sizes["N"], stage.keep, num_text, sizes.get("F", 0) - num_text)
        parts = [graph, *_probe(manifest, manifest.selects.index(graph))]
        found = [matmul_flops(bundle / part.file, example_feeds(part, part.profiles[-1])) for part in parts]
        assert stage_method(schedule.method).flops(manifest.dimensions, schedule, counted) == sum(found)
        by_part = [
            graph_work(manifest, whole, part.profiles[-1]).flops for whole, part in _owned(manifest, parts)
        ]
        assert method != "trio" or by_part == found


def test_the_probe_of_a_quantized_layer_computes_the_products_that_the_formula_counts(
    checkpoint: Path,
) -> None:
    bundle = export(checkpoint, schedule=SCHEDULES["trio"], quantize=parse_plan("int4"))
    manifest = open_bundle(bundle).manifest
    for stage in range(2):
        for whole, part in _owned(manifest, _probe(manifest, stage)):
            profile = part.profiles[-1]
            found = matmul_flops(bundle / part.file, example_feeds(part, profile))
            assert graph_work(manifest, whole, profile).flops == found, part.name


def _probe(manifest: Manifest, stage: int) -> list[GraphSpec]:
    """Return the pieces of the probe of ``stage``."""
    layer = manifest.schedule.stages[stage].layer
    graphs = [graph for graph in manifest.graphs if graph.first_layer == layer]
    pieces = (piece for graph in (*graphs, gradient_graph(manifest)) if graph for piece in graph.split())
    return [piece for piece in pieces if is_probe(piece)]


def _owned(manifest: Manifest, parts: list[GraphSpec]) -> list[tuple[GraphSpec, GraphSpec]]:
    """Return each part with the graph that it is a piece of."""
    return [(manifest.graph(part.name.partition(".")[0]), part) for part in parts]


@pytest.mark.parametrize("method", [method for method in TOKEN_METHODS if method != "visionzip"])
def test_selections_before_the_decoder_compute_the_products_that_the_formula_counts(method: Any) -> None:
    graph = export_once(token_selector(method, num_keep=NUM_KEEP))
    flops = TOKEN_METHODS[method].cost(TokenSizes(40, NUM_KEEP, T, WIDTHS))
    assert flops.products == matmul_flops(graph, random_case().feeds())


def test_visionzip_computes_similarities_and_merged_rows(checkpoint: Path) -> None:
    bundle = export(checkpoint, token_method="visionzip", token_keep=15)
    manifest = open_bundle(bundle).manifest
    graph = manifest.graph("reduce")
    sizes, widths = graph.profiles[-1].sizes, input_widths(graph)
    flops = TOKEN_METHODS["visionzip"].cost(TokenSizes(sizes["N"], 15, 0, widths))
    feeds = example_feeds(graph, graph.profiles[-1])
    assert flops.products == matmul_flops(bundle / graph.file, feeds)
    reduced = manifest.cost.reduced_flops
    assert reduced["reduce"] == flops.products
    answer = prefill_flops(manifest, image_tokens=[manifest.cost.num_visual], kept=(), num_text=40)
    assert answer == pytest.approx(sum(reduced.values()), rel=1e-6)


def test_greedy_steps_count_beside_the_products() -> None:
    sizes = TokenSizes(100, 10, 9, WIDTHS)
    steps = {method: row.cost(sizes).steps for method, row in TOKEN_METHODS.items()}
    assert steps == {
        "visionzip": 0, "holov": 0, "evs": 0, "uniform": 0, "divprune": 10 * 100, "cdpruner": 2 * 10 * 10 * 100,
        "scope": 2 * 10 * 100**2, "eadp": 2 * 10 * 100**2,
    }  # fmt: skip


@pytest.mark.parametrize("method", [None, "visionzip"], ids=["plain", "with what VisionZip looks at"])
def test_the_vision_graph_computes_what_the_manifest_says(method: Any, checkpoint: Path) -> None:
    """Beside the class row of one layer: query and scores, 2 F² + 2 P F in each of 5 tiles."""
    bundle = export(checkpoint, **({} if method is None else {"token_method": method, "token_keep": 15}))
    manifest = open_bundle(bundle).manifest
    graph = manifest.graph("vision")
    looked = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
    class_row = 0 if method is None else 5 * (2 * 32**2 + 2 * 10 * 32)
    assert manifest.cost.reduced_flops["vision"] == looked - class_row
