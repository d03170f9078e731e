"""Every graph of every family is parsed by a real TensorRT; ``tests/runtime/test_cli_build.py`` builds engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.goldens import GOLDEN_NAMES, golden_bundle, load_golden, needs_goldens
from tests.qwen_checkpoints import CAMERA, REDUCED, save_qwen_checkpoint
from tests.spec.reduced_reference import PRESERVED_ANSWER_ROWS
from trio_edge.runtime.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_edge.runtime.manifest import GraphSpec

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)

GRAPHS = ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head"]


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": lambda folder: golden_bundle(load_golden(GOLDEN_NAMES[0]), folder),
    "llava_next with mistral": lambda folder: export(
        save_checkpoint(folder, num_layers=3, num_kv_heads=2, text="mistral", seed=11),
        schedule=PRESERVED_ANSWER_ROWS,
    ),
    "qwen2_5_vl": lambda folder: export(
        save_qwen_checkpoint(folder), schedule=REDUCED, image_sizes=(CAMERA,)
    ),
}
"""Bundles whose graphs are parsed, the same that other tests run."""


def parse(bundle: Bundle, spec: GraphSpec) -> Any:
    """Return the network that TensorRT makes of a graph."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.path(spec.file)))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    return network


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=needs_goldens) if name == "llava" else name for name in FAMILIES]
)
def test_every_graph_of_every_family_is_parsed(family: str, tmp_path: Path) -> None:
    bundle = open_bundle(FAMILIES[family](tmp_path / "checkpoint"))
    for spec in bundle.manifest.graphs:
        network = parse(bundle, spec)
        assert {network.get_input(index).name for index in range(network.num_inputs)} == set(spec.input_names)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_onnx_of_the_default_domain(name: str, reduced_bundle: Path) -> None:
    onnx.checker.check_model(reduced_bundle / f"{name}.onnx")
    model = onnx.load(reduced_bundle / f"{name}.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
