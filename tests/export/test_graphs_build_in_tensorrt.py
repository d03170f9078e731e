"""Every graph is built by a real TensorRT: tensorrt-rtx builds engines on a machine without any GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.qwen_checkpoints import save_qwen_checkpoint
from trio_edge.runtime.bundle import Bundle, open_bundle
from trio_edge.runtime.schedule import Schedule, Stage

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.manifest import GraphSpec, Profile

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)

GRAPHS = ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head"]


FAMILIES = {
    "llava": lambda folder: save_checkpoint(folder, family="llava", num_layers=3, num_kv_heads=4),
    "llava_next mistral": lambda folder: save_checkpoint(
        folder, text="mistral", num_layers=3, num_kv_heads=2
    ),
    "llava_next qwen2": lambda folder: save_checkpoint(folder, text="qwen2", num_layers=3, num_kv_heads=1),
    "qwen2_5_vl": save_qwen_checkpoint,
}
"""Checkpoints of the families and decoders whose graphs are parsed; LLaVA-NeXT with Llama is built."""


def parse(bundle: Bundle, spec: GraphSpec) -> tuple[Any, Any]:
    """Return the builder and the network that TensorRT makes of a graph."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.path(spec.file)))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    return builder, network


def build(bundle: Bundle, spec: GraphSpec) -> int:
    """Build one engine with all profiles of the graph, min = opt = max, and return its size in bytes."""
    builder, network = parse(bundle, spec)
    config = builder.create_builder_config()
    for profile in spec.profiles:
        config.add_optimization_profile(_optimization_profile(builder, spec, profile))
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def _optimization_profile(builder: Any, spec: GraphSpec, profile: Profile) -> Any:
    result = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shape = tuple(profile.sizes[size] if isinstance(size, str) else size for size in tensor.shape)
        result.set_shape(tensor.name, shape, shape, shape)
    return result


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_builds_with_all_its_profiles(name: str, reduced_bundle: Path) -> None:
    bundle = open_bundle(reduced_bundle)
    assert build(bundle, bundle.manifest.graph(name)) > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_every_graph_of_every_family_is_parsed(family: str, tmp_path: Path) -> None:
    """With two picture sizes where the family has several, so that N is an axis, and in float16, as on a device."""
    schedule = Schedule(
        stages=(Stage(layer=1, keep=9), Stage(layer=2, keep=4)),
        positions="preserved" if family == "qwen2_5_vl" else "compact",
    )
    checkpoint = FAMILIES[family](tmp_path / "checkpoint")
    bundle = open_bundle(export(checkpoint, schedule=schedule, image_sizes=((150, 100),), dtype="float16"))
    for spec in bundle.manifest.graphs:
        _, network = parse(bundle, spec)
        assert {network.get_input(index).name for index in range(network.num_inputs)} == set(spec.input_names)


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_onnx_of_the_default_domain(name: str, reduced_bundle: Path) -> None:
    onnx.checker.check_model(reduced_bundle / f"{name}.onnx")
    model = onnx.load(reduced_bundle / f"{name}.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
