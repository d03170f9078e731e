"""A probe's pieces: joined with what reads the same weights they compute what they compute alone, and no weight is there twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.bundles import export
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.integer_products import use_integer_products
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.graph_io import check_tensors
from trio_edge.runtime.bundle.manifest import manifest_from_json
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.devices.interface import shape_at
from trio_edge.runtime.engines.cpu import ACCURACY_KEY, ACCURACY_LEVELS, onnxruntime_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile

INTEGERS = {"rtol": 2e-3, "atol": 2e-3}
"""The head's gradient in integers of 13 bits against float32, scores relative to the largest."""


@pytest.fixture(scope="module")
def quantized_bundle(checkpoint: Path) -> Path:
    schedule = Schedule(stages=(Stage(layer=1, keep=8), Stage(layer=2, keep=3)))
    return export(checkpoint, schedule=schedule, quantize=parse_plan("int4,head=int8"))


def _session(file: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry(ACCURACY_KEY, ACCURACY_LEVELS["float32"])
    return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def _inputs(spec: GraphSpec, profile: Profile) -> dict[str, NDArray[Any]]:
    """Return random inputs of all tensors: rows within the sequence, visual tokens from row 1 on."""
    random, found = np.random.default_rng(1), {}
    for tensor in spec.inputs:
        shape = shape_at(tensor.shape, profile)
        if tensor.dtype != "int32":
            values = random.standard_normal(shape)
        elif tensor.name.endswith("visual_rows"):
            values = np.arange(1, 1 + shape[0])
        elif tensor.name in ("past_length", "last_row"):
            values = np.zeros(shape)
        elif shape == (1,):
            values = np.full(shape, 9)
        else:
            values = np.broadcast_to(np.arange(shape[-1]), shape)
        found[tensor.name] = np.asarray(values).astype(tensor.dtype)
    return found


def _both(
    bundle: Path, name: str, profile: Profile
) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Return the outputs of the piece that a profile belongs to, by the joined graph and by the piece alone."""
    spec = open_bundle(bundle).manifest.graph(name)
    piece = next(piece for piece in spec.split() if profile in piece.profiles)
    inputs, names = _inputs(spec, profile), [tensor.name for tensor in piece.outputs]
    joined = _session(bundle / spec.file).run(names, inputs)
    alone = _session(bundle / piece.file).run(names, {key: inputs[key] for key in piece.input_names})
    return dict(zip(names, joined)), dict(zip(names, alone))


@pytest.mark.skipif(
    onnxruntime_version() < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, cannot run pieces without elements; runs on 3.11 and later",
)
@pytest.mark.parametrize("name", ["segment_1", "suffix", "head"])
def test_a_joined_graph_computes_one_piece_while_the_others_have_no_elements(
    name: str, reduced_bundle: Path
) -> None:
    for profile in open_bundle(reduced_bundle).manifest.graph(name).profiles:
        joined, alone = _both(reduced_bundle, name, profile)
        for output, values in alone.items():
            assert values.size, f"{profile.name} {output}"
            np.testing.assert_allclose(joined[output], values, rtol=1e-4, atol=1e-5, err_msg=output)


@pytest.mark.skipif(
    onnxruntime_version() < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, cannot run pieces without elements; runs on 3.11 and later",
)
@pytest.mark.parametrize("name", ["probe_1", "gradient"])
def test_probes_of_quantized_weights_stand_alone(name: str, quantized_bundle: Path) -> None:
    for profile in open_bundle(quantized_bundle).manifest.graph(name).profiles:
        joined, alone = _both(quantized_bundle, name, profile)
        for output, values in alone.items():
            scale = np.abs(values).max()
            np.testing.assert_allclose(joined[output] / scale, values / scale, **INTEGERS, err_msg=output)


@pytest.mark.skipif(
    onnxruntime_version() < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, cannot run pieces without elements; runs on 3.11 and later",
)
def test_a_large_gram_matrix_is_in_a_file_that_the_piece_and_the_joined_graph_read(
    checkpoint: Path, reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with grouped-query attention of released sizes, where it has megabytes."""
    monkeypatch.setattr("trio_edge.export.bundle._LARGEST_INLINE_BYTES", 1024)
    schedule = open_bundle(reduced_bundle).manifest.schedule
    options = ExportOptions(model=str(checkpoint), out=tmp_path / "bundle", max_text=64, max_new_tokens=40)
    with shared_traces():
        export_bundle(options, schedule_for=lambda _inputs: schedule)
    spec = open_bundle(tmp_path / "bundle").manifest.graph("segment_1")
    places = [
        {
            (value.const_value.location, value.const_value.offset)
            for name, value in ir.load(tmp_path / "bundle" / file).graph.initializers.items()
            if name.endswith("key_value_gram") and isinstance(value.const_value, ir.ExternalTensor)
        }
        for file in (spec.file, "segment_1.saliency.onnx")
    ]
    assert len(places[0]) == 1 and places[0] == places[1]
    profile = next(profile for profile in spec.profiles if profile.name.startswith("saliency"))
    joined, alone = _both(tmp_path / "bundle", "segment_1", profile)
    _, inline = _both(reduced_bundle, "segment_1", profile)
    np.testing.assert_array_equal(alone["saliency_scores"], inline["saliency_scores"])
    np.testing.assert_allclose(joined["saliency_scores"], inline["saliency_scores"], rtol=1e-4)


def test_no_weight_is_in_two_graphs(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    assert manifest.device_weight_ratio <= 1.0
    assert all(select.weight_bytes == 0 for select in manifest.selects)


def test_quantized_layers_are_repeated_once_a_stage_and_the_head_once(quantized_bundle: Path) -> None:
    graphs = {graph.name: graph.weight_bytes for graph in open_bundle(quantized_bundle).manifest.graphs}
    assert graphs["probe_1"] == graphs["segment_1"]
    assert graphs["gradient"] == graphs["head"]
    assert [name for name in graphs if name.startswith(("probe", "gradient"))] == [
        "probe_1",
        "probe_2",
        "gradient",
    ]


def test_an_engine_says_which_graph_it_is(quantized_bundle: Path, reduced_bundle: Path) -> None:
    for bundle in (quantized_bundle, reduced_bundle):
        graphs = make_backend("onnxruntime").load(open_bundle(bundle))
        try:
            assert [engine.spec.name for engine in graphs.engines.values()] == list(graphs.engines)
        finally:
            graphs.close()


def _changed(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "trio.json").read_bytes())
    change({graph["name"]: graph for graph in manifest["graphs"]})
    check_tensors(manifest_from_json(json.dumps(manifest).encode(), where="trio.json"), where="trio.json")


def test_each_tensor_and_profile_must_belong_to_one_piece(reduced_bundle: Path) -> None:
    for kind in ("inputs", "outputs", "profiles"):
        for change in (
            lambda graphs, kind=kind: graphs["suffix"]["pieces"][0][kind].pop(),
            lambda graphs, kind=kind: graphs["suffix"]["pieces"][1][kind].append("other"),
        ):
            with pytest.raises(
                ManifestError, match="expected each input, output and profile in one of its pieces"
            ):
                _changed(reduced_bundle, change)


def test_a_selection_without_its_probe_is_refused(reduced_bundle: Path) -> None:
    def without_probe(graphs: dict[str, Any]) -> None:
        graphs["suffix"]["first_layer"] += 0
        graphs["head"]["pieces"] = []

    with pytest.raises(ManifestError, match="graph 'head'"):
        _changed(reduced_bundle, without_probe)


def test_files_of_pieces_are_files_of_the_bundle(reduced_bundle: Path) -> None:
    def elsewhere(graphs: dict[str, Any]) -> None:
        graphs["suffix"]["pieces"][1]["file"] = "../probe.onnx"

    with pytest.raises((ManifestError, msgspec.ValidationError), match="expected a path inside the bundle"):
        _changed(reduced_bundle, elsewhere)


# Integer products


def _graph_with(weight: NDArray[np.int8], scales: NDArray[np.float32], *, is_forward: bool) -> ir.Model:
    """Return a graph of one product with an INT8 weight [I, O], from the right or from the left."""
    values = ir.Value(name="weight", const_value=ir.tensor(weight), shape=ir.Shape(weight.shape))
    values.type = ir.TensorType(ir.DataType.INT8)
    scale = ir.Value(name="scale", const_value=ir.tensor(scales), shape=ir.Shape(scales.shape))
    scale.type = ir.TensorType(ir.DataType.FLOAT)
    rows = ir.Value(name="rows", type=ir.TensorType(ir.DataType.FLOAT))
    rows.shape = ir.Shape(["R", weight.shape[0]]) if is_forward else ir.Shape([weight.shape[1], "R"])
    dequantized = ir.node("DequantizeLinear", [values, scale], {"axis": 1})
    operands = [rows, dequantized.outputs[0]] if is_forward else [dequantized.outputs[0], rows]
    product = ir.node("MatMul", operands)
    result = product.outputs[0]
    result.name, result.type = "result", ir.TensorType(ir.DataType.FLOAT)
    last = ir.node("Identity", [result])
    last.outputs[0].name, last.outputs[0].type = "output", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [rows], last.outputs, nodes=[dequantized, product, last], initializers=[values, scale],
        opset_imports={"": 21}, name="product",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def _product(
    weight: NDArray[np.int8], scales: NDArray[np.float32], rows: NDArray[np.float32], *, is_forward: bool
) -> NDArray[np.float32]:
    model = _graph_with(weight, scales, is_forward=is_forward)
    assert use_integer_products(model) == 1
    kinds = [node.op_type for node in model.graph]
    assert "DequantizeLinear" not in kinds
    session = ort.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: NDArray[np.float32] = session.run(None, {"rows": rows})[0]
    return result


@pytest.mark.parametrize("is_forward", [True, False])
def test_integer_products_are_near_those_in_floats(is_forward: bool) -> None:
    random = np.random.default_rng(0)
    weight = random.integers(-127, 128, (48, 300), dtype=np.int8)
    scales = random.uniform(0.001, 0.1, 300).astype(np.float32)
    # as gradients of the head are: one large number and many small ones; and a row of zeros
    rows = (random.standard_normal((4, 48 if is_forward else 300)) ** 5).astype(np.float32)
    rows[2] = 0.0
    dense = weight.astype(np.float64) * scales
    expected = rows @ dense if is_forward else dense @ rows.T
    got = _product(weight, scales, rows if is_forward else rows.T.copy(), is_forward=is_forward)
    np.testing.assert_allclose(got / np.abs(expected).max(), expected / np.abs(expected).max(), atol=5e-4)
    assert np.all((got[2] if is_forward else got[:, 2]) == 0.0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_forward", [True, False])
def test_integer_products_do_not_overflow(is_forward: bool, sign: int) -> None:
    weight = np.full((8192, 16) if is_forward else (4, 300_000), 127, dtype=np.int8)
    scales = np.full(weight.shape[1], 0.5, np.float32)
    rows = np.full((2, 8192) if is_forward else (300_000, 2), 3.0 * sign, np.float32)
    got = _product(weight, scales, rows, is_forward=is_forward)
    terms = weight.shape[0 if is_forward else 1]
    np.testing.assert_allclose(got, sign * 3.0 * 0.5 * 127 * terms, rtol=1e-3)
