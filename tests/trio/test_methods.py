"""The table of selectors: every row loads, exports a small checkpoint, is counted and has a test of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bundles import export
from tests.matmul_flops import example_feeds, matmul_flops
from tests.spec.test_counted_flops import SCHEDULES
from trio_edge.export.options import ExportOptions
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.cost.bundle_work import counted, reduce_cost
from trio_edge.trio.methods import (
    STAGE_METHODS,
    TOKEN_METHODS,
    StageMethod,
    TokenMethod,
    described,
    stage_method,
    token_method,
)

ROWS = [*STAGE_METHODS.values(), *TOKEN_METHODS.values()]
TESTS = Path(__file__).parent / "selectors"
TESTED_BY_PARTS = {"trio": "../test_select_graph.py"}
"""TRIO is a probe and an NMS, which have tests of their own."""


def _schedule(row: StageMethod) -> Schedule:
    """Return a schedule for the small checkpoint, that of the other tests where there is one: they share bundles."""
    made = Schedule(stages=(Stage(layer=2, keep=9),), method=row.name, positions=row.positions)
    return SCHEDULES.get(row.name, made)


@pytest.mark.parametrize("row", STAGE_METHODS.values(), ids=lambda row: row.name)
def test_every_selector_inside_the_decoder_exports_and_computes_what_is_counted(
    row: StageMethod, checkpoint: Path
) -> None:
    bundle = export(checkpoint, schedule=_schedule(row))
    manifest = open_bundle(bundle).manifest
    graph = manifest.selects[-1]
    computed = matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
    assert counted(manifest, graph, graph.profiles[-1]).flops == pytest.approx(computed, rel=1e-9)
    assert (manifest.cost.reduced_flops["select"] > 0) == (computed > 0)


@pytest.mark.parametrize("row", TOKEN_METHODS.values(), ids=lambda row: row.name)
def test_every_selector_before_the_decoder_exports_and_computes_what_is_counted(
    row: TokenMethod, checkpoint: Path
) -> None:
    bundle = export(checkpoint, token_method=row.name, token_keep=15)
    manifest = open_bundle(bundle).manifest
    graph = manifest.graph("reduce")
    sizes = graph.profiles[-1].sizes
    cost = reduce_cost(manifest, num_visual=sizes["N"], num_text=sizes.get("T", 0))
    assert cost.products == matmul_flops(bundle / graph.file, example_feeds(graph, graph.profiles[-1]))
    assert manifest.cost.reduced_flops["reduce"] >= 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_selector_has_a_test_file_named_after_its_module(row: StageMethod | TokenMethod) -> None:
    module = row.selector.partition(":")[0].rpartition(".")[2]
    assert (TESTS / TESTED_BY_PARTS.get(row.name, f"test_{module}.py")).exists()
    assert row.summary in described(StageMethod) + described(TokenMethod)


def test_a_method_that_is_no_row_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ScheduleError, match=r"method: expected one of trio, fastv, .*, got 'trio2'"):
        stage_method("trio2")
    with pytest.raises(ScheduleError, match=r"token_method: expected one of visionzip, .*, got 'zip'"):
        token_method("zip")


def test_an_export_with_an_unknown_method_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(ScheduleError, match=r"token_method: expected one of"):
        ExportOptions(model=str(checkpoint), out=tmp_path / "bundle", token_method="zip", token_keep=15)
    with pytest.raises(ScheduleError, match=r"method: expected one of"):
        export(checkpoint, schedule=Schedule(stages=(Stage(layer=2, keep=9),), method="zip"))


def test_a_method_in_a_manifest_is_a_name() -> None:
    with pytest.raises(ScheduleError, match=r"method: expected a name in small letters, got ''"):
        Schedule(method="")
