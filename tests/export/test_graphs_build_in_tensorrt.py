"""Every graph is built by a real TensorRT: tensorrt-rtx builds engines on a machine without any GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import pytest

from trio_edge.runtime.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.manifest import GraphSpec, Profile

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)

GRAPHS = ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head"]


def build(bundle: Bundle, spec: GraphSpec) -> int:
    """Build one engine with all profiles of the graph, min = opt = max, and return its size in bytes."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(bundle.path(spec.file)))
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
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


@pytest.mark.parametrize("name", GRAPHS)
def test_graph_is_valid_onnx_of_the_default_domain(name: str, reduced_bundle: Path) -> None:
    onnx.checker.check_model(reduced_bundle / f"{name}.onnx")
    model = onnx.load(reduced_bundle / f"{name}.onnx", load_external_data=False)
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 18}
