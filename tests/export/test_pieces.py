"""A probe's pieces: joined with what reads the same weights they compute what they compute alone, and no weight is there twice."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.engine_bundles import build_here
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.engines.cpu import ACCURACY_KEY, ACCURACY_LEVELS, onnxruntime_version

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile


@pytest.fixture(scope="module")
def quantized_bundle(checkpoint: Path) -> Path:
    schedule = Schedule(stages=(Stage(layer=1, keep=8), Stage(layer=2, keep=3)))
    return export(checkpoint, schedule=schedule, quantize=parse_plan("int4,head=int8"))


@pytest.fixture(scope="module")
def rounded_bundle(checkpoint: Path) -> Path:
    """Return a bundle whose decoder has INT8 weights and rounds its inputs to INT8."""
    schedule = Schedule(stages=(Stage(layer=1, keep=8), Stage(layer=2, keep=3)))
    linears = [f"self_attn.{name}_proj" for name in "qkvo"] + [
        f"mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    largest = {
        f"language_model.layers.{layer}.{linear}.weight": 6.0 + layer
        for layer in range(4)
        for linear in linears
    }
    scales = CalibratedScales(activation_max=largest)
    return export(checkpoint, schedule=schedule, quantize=parse_plan("int8"), scales=scales)


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
@pytest.mark.parametrize("name", ["segment_1", "suffix"])
@pytest.mark.parametrize("form", ["quantized_bundle", "rounded_bundle"])
def test_a_quantized_layer_and_its_probe_share_products(
    form: str, name: str, request: pytest.FixtureRequest
) -> None:
    """Also if the inputs of the products are rounded."""
    bundle = request.getfixturevalue(form)
    for profile in open_bundle(bundle).manifest.graph(name).profiles:
        joined, alone = _both(bundle, name, profile)
        for output, values in alone.items():
            scale = np.abs(values).max()
            np.testing.assert_allclose(
                joined[output] / scale, values / scale, rtol=1e-4, atol=1e-5, err_msg=output
            )


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
    options = ExportOptions(
        model=str(checkpoint), out=tmp_path / "bundle", schedule=schedule, max_text=64, max_new_tokens=40
    )
    with shared_traces():
        export_bundle(options)
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


def test_of_quantized_layers_only_the_attention_is_repeated_and_of_the_head_nothing(
    quantized_bundle: Path,
) -> None:
    graphs = {graph.name: graph for graph in open_bundle(quantized_bundle).manifest.graphs}
    assert graphs["gradient"].weight_bytes < 0.05 * graphs["head"].weight_bytes, "the final norm alone"
    assert [name for name in graphs if name.startswith(("probe", "gradient"))] == [
        "probe_1",
        "probe_2",
        "gradient",
    ]
    for name in ("probe_1", "probe_2"):
        weights = ir.load(quantized_bundle / graphs[name].file).graph.initializers
        read = {weight.split(".")[-2] for weight in weights if weight.endswith("proj.weight")}
        assert read == {"k_proj", "v_proj", "o_proj"}


def test_an_engine_may_read_a_quantized_weight_at_one_place_only(quantized_bundle: Path) -> None:
    """tensorrt-rtx 1.7 can end abnormally while it builds an engine with two products of an INT4 weight."""
    for spec in open_bundle(quantized_bundle).manifest.graphs:
        read = [
            node.inputs[0]
            for node in ir.load(quantized_bundle / spec.file).graph
            if node.op_type == "DequantizeLinear"
        ]
        assert len(read) == len(set(read)), spec.name


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_tensorrt_builds_the_graphs_of_a_wide_int4_layer(num_kv_heads: int, tmp_path: Path) -> None:
    """Narrow ones have no kernels of their own for INT4, and build in any form."""
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    wide = {
        "hidden_size": 512,
        "intermediate_size": 704,
        "num_attention_heads": 4,
        "num_key_value_heads": num_kv_heads,
    }
    checkpoint = save_checkpoint(tmp_path / "wide", num_layers=2, dtype=torch.float16, text_settings=wide)
    schedule = Schedule(stages=(Stage(layer=1, keep=8),))
    bundle = open_bundle(export(checkpoint, schedule=schedule, quantize=parse_plan("int4")))
    graphs = {"probe_1", "suffix"}
    assert build_here(bundle, tmp_path, graphs=graphs).keys() == graphs


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
    manifest_from_json(json.dumps(manifest).encode(), where="trio.json")


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
