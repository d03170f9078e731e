"""A real TensorRT builds every graph of LLaVA and of the packaged model; other families are in ``tests/spec``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.engine_bundles import build_here
from tests.goldens import GOLDEN_NAMES, golden_bundle, load_golden, needs_goldens
from tests.schedules import schedule_for
from tests.spec.reduced_reference import PRESERVED_ANSWER_ROWS
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)

GRAPHS = ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head"]


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": lambda folder: golden_bundle(load_golden(GOLDEN_NAMES[0]), folder),
    "llava_next with mistral": lambda folder: export(
        save_checkpoint(folder, num_layers=3, num_kv_heads=2, text="mistral", seed=11),
        schedule=PRESERVED_ANSWER_ROWS,
    ),
    "the packaged model": lambda _: export(
        "tiny", dtype="float32", schedule=schedule_for(1 / 9, num_layers=16, num_visual=192)
    ),
}
"""Bundles whose engines are built, the same that other tests run."""


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=needs_goldens) if name == "llava" else name for name in FAMILIES]
)
def test_every_graph_of_every_family_is_built(family: str, tmp_path: Path) -> None:
    bundle = open_bundle(FAMILIES[family](tmp_path / "checkpoint"))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_onnx_of_the_default_domain(name: str, reduced_bundle: Path) -> None:
    onnx.checker.check_model(reduced_bundle / f"{name}.onnx")
    model = onnx.load(reduced_bundle / f"{name}.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
