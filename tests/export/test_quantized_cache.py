"""KV caches in INT8: graphs that round what they remember, what that takes, and that nobody gets them without scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort
import pytest

from tests.bundles import INT8_CACHES
from trio_edge.export import cli
from trio_edge.profiling.predict.answer import predict
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.trio.cost.bundle_work import graph_work
from trio_edge.trio.cost.devices import find_device

DECODER = ("prefix", "segment_1", "suffix")
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def bundle(int8_cache_bundle: Path) -> Bundle:
    return open_bundle(int8_cache_bundle)


@pytest.fixture(scope="module")
def plain(reduced_bundle: Path) -> Bundle:
    """The same with KV caches in float32."""
    return open_bundle(reduced_bundle)


def scale_of(tensor: str) -> np.float32:
    _, layer, part = tensor.split(".")
    return np.float32(getattr(INT8_CACHES.cache_max[int(layer)], part) / 127)


def inputs_of(bundle: Bundle, graph: str, *, past_length: int) -> Arrays:
    """Return random inputs: of a prefill for no past rows, else of a decode step."""
    spec, random = bundle.manifest.graph(graph).split()[0], np.random.default_rng(0)
    wanted = "decode" if past_length else spec.profiles[0].name
    (sizes,) = (profile.sizes for profile in spec.profiles if profile.name == wanted)
    assert (sizes["S"] == 1) == (sizes["C"] > 0) == (past_length > 0)
    values: Arrays = {}
    for tensor in spec.inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in tensor.shape]
        values[tensor.name] = (
            random.integers(-128, 128, shape) if tensor.dtype == "int8" else random.standard_normal(shape)
        ).astype(tensor.dtype)
    positions = np.arange(past_length, past_length + sizes["S"], dtype=np.int32)
    return values | {"position_ids": positions[None], "past_length": np.array([past_length], np.int32)}


def run(bundle: Bundle, graph: str, inputs: Arrays) -> Arrays:
    path = bundle.path(bundle.manifest.graph(graph).split()[0].file)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))


@pytest.mark.parametrize("past_length", [0, 9], ids=["prefill", "decode"])
@pytest.mark.parametrize("graph", DECODER)
def test_new_rows_are_rounded_and_past_ones_read_so(
    graph: str, past_length: int, bundle: Bundle, plain: Bundle
) -> None:
    inputs = inputs_of(bundle, graph, past_length=past_length)
    got = run(bundle, graph, inputs)
    past = {
        name: rows * scale_of(name) for name, rows in inputs.items() if name.startswith("past_key_values.")
    }
    expected = run(plain, graph, inputs | past)
    first = int(bundle.manifest.graph(graph).first_layer or 0)
    for name in (f"present.{first}.key", f"present.{first}.value"):  # later layers read rounded rows
        values = np.clip(np.round(expected[name] / scale_of(name)), -128, 127).astype(np.int8)
        assert len(np.unique(values)) > 8
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.mark.parametrize("graph", DECODER)
def test_rows_at_once_are_rows_one_after_the_other(graph: str, bundle: Bundle) -> None:
    whole = inputs_of(bundle, graph, past_length=9)
    (hidden,) = (name for name in whole if name in ("inputs_embeds", "hidden_states"))
    (out,) = (name for name in run(bundle, graph, whole) if name == "hidden_states_out")
    rows = np.random.default_rng(1).standard_normal((1, 3, whole[hidden].shape[-1])).astype(np.float32)
    places = np.arange(9, 12, dtype=np.int32)[None]
    together = run(bundle, graph, whole | {hidden: rows, "position_ids": places})[out]
    for row in range(3):
        one = {hidden: rows[:, row : row + 1], "position_ids": places[:, row : row + 1]}
        got = run(bundle, graph, whole | one | {"past_length": np.array([9 + row], np.int32)})
        np.testing.assert_allclose(got[out][:, 0], together[:, row], rtol=1e-5, atol=1e-5)
        for name, values in got.items():
            if name.startswith("present."):
                whole[name.replace("present", "past_key_values")][:, :, 9 + row] = values[:, :, 0]


def test_the_caches_are_half_as_large_as_in_float16(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert manifest.kv_dtype == "int8"
    assert manifest.quantization is not None
    assert manifest.quantization.formats == {"kv": "int8"}
    half = msgspec.structs.replace(manifest, dtype="float16", quantization=None)
    assert 2 * manifest.kv_bytes == half.kv_bytes


def test_weights_stay_and_ranges_alone_take_a_later_opset(bundle: Bundle, plain: Bundle) -> None:
    for spec, other in zip(bundle.manifest.graphs, plain.manifest.graphs, strict=True):
        assert spec.opset == (19 if spec.name in DECODER else None)
        assert spec.weight_bytes == pytest.approx(other.weight_bytes, abs=32)


def test_a_decode_step_moves_a_quarter_of_the_float32_cache(bundle: Bundle, plain: Bundle) -> None:
    dims = plain.manifest.dimensions
    for graph in DECODER:
        spec = plain.manifest.graph(graph)
        profile = spec.split()[0].profiles[-1]
        elements = spec.num_layers * profile.sizes["C"] * 2 * dims.num_kv_heads * dims.head_size
        before, after = (
            graph_work(one.manifest, one.manifest.graph(graph), profile) for one in (plain, bundle)
        )
        saved = before.moved_bytes - before.weight_bytes - (after.moved_bytes - after.weight_bytes)
        assert saved == 3 * elements


def test_a_prediction_has_a_quarter_of_the_float32_caches_and_faster_steps(
    bundle: Bundle, plain: Bundle
) -> None:
    target = find_device("jetson-orin-nx-16")
    rounded, whole = (predict(plan_for(manifest=one.manifest), target) for one in (bundle, plain))
    assert 4 * rounded.memory.kv_caches == whole.memory.kv_caches
    assert rounded.seconds("decode") < whole.seconds("decode")
    assert rounded.seconds("prefill") == whole.seconds("prefill")


def test_exporting_without_a_calibration_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert cli.main([str(checkpoint), "--out", str(out), "--quantize", "int4,kv=int8"]) == 2
    error = capsys.readouterr().err
    assert "expected kv=int8 with scales of keys and values" in error
    assert "run trio-calibrate" in error
    assert "\n" not in error.strip()
    assert not out.exists()


def test_tensorrt_builds_layer_ranges_with_int8_caches(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    from tests.engine_bundles import build_here

    graphs = {"prefix", "suffix"}
    assert build_here(bundle, tmp_path, graphs=graphs).keys() == graphs
