"""The roofline's verdicts, the product that ceilings are measured with, and the slowest layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.engine_bundles import HOST
from trio_edge.profiling.measure import ceilings
from trio_edge.profiling.measure.ceilings import (
    Ceilings,
    measure_ceilings,
    product_model,
    write_product_bundle,
)
from trio_edge.profiling.measure.layers import LayerCall, layer_times, slowest_layers
from trio_edge.profiling.report.summary import judge
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build

CEILINGS = Ceilings(flops_per_s=1e12, matmul="", bytes_per_s=1e11, copy="")  # ridge at 10 FLOPs a byte


@pytest.mark.parametrize(
    ("flops", "moved", "milliseconds", "bound", "text"),
    [
        pytest.param(1e6, 7.1e6, 0.1, "memory", "memory-bound, 71 % of bandwidth", id="memory"),
        pytest.param(5e9, 1e7, 10, "compute", "compute-bound, 50 % of the matmul rate", id="compute"),
        pytest.param(
            1.2e10,
            1e7,
            10,
            "compute",
            "compute-bound, 120 % of the matmul rate: repeat on an idle machine",
            id="busy",
        ),
        pytest.param(1e6, 1e6, 1, "neither", "bound by neither: 1 % of bandwidth", id="neither"),
        pytest.param(
            1e6, 2e7, 0.1, "memory", "memory-bound, 200 % of bandwidth: its data stays in caches", id="caches"
        ),
    ],
)
def test_the_verdict_is_by_the_nearer_ceiling(
    flops: float, moved: float, milliseconds: float, bound: str, text: str
) -> None:
    verdict = judge(flops=flops, moved_bytes=moved, milliseconds=milliseconds, ceilings=CEILINGS)
    assert (verdict.bound, verdict.text) == (bound, text)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_product_is_what_onnx_writes_and_multiplies(dtype: str, tmp_path: Path) -> None:
    size, kind = 200, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = onnx.TensorProto(dims=(size, size), data_type=kind, name="weights", data_location="EXTERNAL")
    weights.external_data.add(key="location", value="weights.bin")
    rows, product = (
        onnx.helper.make_tensor_value_info(name, kind, ["S", "S"]) for name in ("rows", "product")
    )
    node = onnx.helper.make_node("MatMul", ["rows", "weights"], ["product"])
    graph = onnx.helper.make_graph([node], "matmul", [rows], [product], [weights])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="")
    content = product_model(dtype, size=size)
    assert content == model.SerializeToString()
    (file := tmp_path / "matmul.onnx").write_bytes(content)
    left, right = np.random.default_rng(0).standard_normal((2, size, size), np.float32).astype(dtype)
    (tmp_path / "weights.bin").write_bytes(right.tobytes())
    onnx.checker.check_model(str(file), full_check=True)
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"rows": left})
    expected = left.astype(np.float64) @ right.astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=0.1 if dtype == "float16" else 1e-4)


def test_tensorrt_builds_the_product_for_a_gpu_that_is_not_there(
    reduced_bundle: Path, tmp_path: Path
) -> None:
    bundle = write_product_bundle(tmp_path, open_bundle(reduced_bundle).manifest, size=64)
    options = BuildOptions(backend="tensorrt-rtx", compute_capabilities=(86,), graphs=("head",))
    engines = build_engines(plan_build(bundle, options, host=HOST))
    assert [entry.graph for entry in engines.engines] == ["head"]


def test_ceilings_are_what_a_product_and_a_copy_reach(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "_SECONDS", 0.05)
    manifest = open_bundle(reduced_bundle).manifest
    found = measure_ceilings(make_backend("onnxruntime", threads=1), manifest, cores=1)
    assert 1e8 < found.flops_per_s < 1e14
    assert 1e7 < found.bytes_per_s < 1e13
    assert found.matmul == "float32 [1024, 1024] x [1024, 1024] through onnxruntime"


def test_an_interruption_makes_no_layer_one_of_the_slowest() -> None:
    runs = [[LayerCall("slow", "MatMul", 2.0, ""), LayerCall("fast", "Add", 0.5, "")] for _ in range(6)]
    runs[3][1] = LayerCall("fast", "Add", 40.0, "")
    found = layer_times(runs, graph="suffix", profiles=["decode"] * 6, num_answers=2)
    assert [(layer.name, layer.answer_ms) for layer in slowest_layers(found)] == [
        ("slow", 6.0),
        ("fast", 1.5),
    ]
