"""Quantized bundles: the numbers, what --quantize means, and graphs that compute with exactly the rounded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.conftest import REDUCED_STAGES
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.checkpoints.checkpoint import canonical_name, read_checkpoint
from trio_edge.export.checkpoints.weights import read_tensor
from trio_edge.export.options import ExportOptions, Progress
from trio_edge.export.quantize.graph import SCALE_SUFFIX
from trio_edge.export.quantize.numerics import block_size, pack_int4, quantize_weight, stored_bytes
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

PLAN = parse_plan("all=int4,head=int8,embedding=int8")
SCHEDULE = Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in REDUCED_STAGES))


@pytest.fixture(scope="module")
def quantized(checkpoint: Path) -> Bundle:
    """The shared checkpoint with everything quantized. No test may change it."""
    return open_bundle(export(checkpoint, schedule=SCHEDULE, quantize=PLAN))


# ------------------------------------------------------------------------------------------------ numbers


def test_an_odd_end_of_int4_is_filled_with_zero() -> None:
    assert pack_int4(torch.tensor([-8, 7, -1], dtype=torch.int8)).tolist() == [0x78, 0x0F]


def test_int4_bytes_are_what_onnx_reads() -> None:
    values = torch.arange(-8, 8, dtype=torch.int8).reshape(4, 4)
    raw = pack_int4(values).numpy().tobytes()
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=[4, 4], raw_data=raw)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), values.numpy())


@pytest.mark.parametrize(("kind", "block"), [("int4", 32), ("int8", None)])
def test_rounding_is_off_by_half_a_scale_at_most(kind: Any, block: int | None) -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    rounded = quantize_weight(weight, kind=kind, dtype="float32", block=block)
    scale = rounded.scales_OB.repeat_interleave(64 // rounded.scales_OB.shape[1], dim=1)
    assert ((rounded.dequantized() - weight).abs() <= 0.5001 * scale).all()


def test_a_block_of_zeros_stays_zero() -> None:
    rounded = quantize_weight(torch.zeros(2, 32), kind="int4", dtype="float16", block=16)
    assert torch.equal(rounded.dequantized(), torch.zeros(2, 32, dtype=torch.float16))


def test_values_and_scales_are_stored_inputs_first() -> None:
    weight = torch.arange(1, 65, dtype=torch.float32).reshape(2, 32)
    values, scales = stored_bytes(
        quantize_weight(weight, kind="int4", dtype="float32", block=16), kind="int4"
    )
    assert scales.shape == (2, 2)
    assert scales[0, 1] == pytest.approx(48 / 7)
    # the first byte holds both outputs of input 0: 1 of a block up to 16, 33 of one up to 48
    assert values[0] == round(1 / (16 / 7)) | round(33 / (48 / 7)) << 4


@pytest.mark.parametrize(
    ("num_inputs", "size"), [(4096, 128), (576, 64), (288, 32), (96, 32), (112, 16), (3420, None)]
)
def test_a_block_is_the_largest_power_of_two_up_to_128_that_divides(
    num_inputs: int, size: int | None
) -> None:
    assert block_size(num_inputs) == size


# ---------------------------------------------------------------------------------------------- --quantize


@pytest.mark.parametrize(
    ("text", "formats"),
    [
        ("int4", {"prefix": "int4", "segments": "int4", "suffix": "int4"}),
        ("suffix=int4,head=int8", {"suffix": "int4", "head": "int8"}),
        ("int8,suffix=none", {"prefix": "int8", "segments": "int8", "suffix": "none"}),
        ("embedding=int8", {"embedding": "int8"}),
        ("kv=int8", {"kv": "int8"}),
        ("fp8,prefix=int8", {"prefix": "int8", "segments": "fp8", "suffix": "fp8"}),
    ],
    ids=["the decoder", "by part", "later entries win", "the table", "the KV caches", "in FP8"],
)
def test_a_plan_names_parts_and_formats(text: str, formats: dict[str, str]) -> None:
    assert parse_plan(text).formats == formats


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "expected none, int4, int8, fp8, got 'int3'"),
        ("tail=int4", "expected one of vision, .*, got 'tail'"),
        ("embedding=int4", "embedding=int8 or none"),
        ("embedding=fp8", "embedding=int8 or none, got fp8"),
        ("kv=int4", "kv=int8 or none"),
        ("all=int8,kv=fp8", "kv=int8 or none, got fp8"),
        ("int4,outliers=10", "outliers above 0% and up to 25%, got '10'"),
        ("int4,outliers=60%", "outliers above 0% and up to 25%, got '60%'"),
        ("fp8,outliers=10%", "expected outliers with a part in int4, got none"),
    ],
)
def test_a_plan_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        parse_plan(text)


# ------------------------------------------------------------------------------------------------- bundles


def twin_of(graph: str, full: Bundle, checkpoint: Path) -> ort.InferenceSession:
    """Return the unquantized ``graph`` with its linear weights replaced by their rounded values."""
    source = read_checkpoint(str(checkpoint))
    tensors = {canonical_name(name): tensor for name, tensor in source.tensors.items()}
    model = ir.load(full.path(full.manifest.graph(graph).split()[0].file))
    first = full.manifest.graph(graph).first_layer or 0
    for name, value in model.graph.initializers.items():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        values = value.const_value.numpy()
        layer, _, rest = name.partition("layers.")[2].partition(".")
        stored = tensors.get(f"language_model.layers.{first + int(layer or 0)}.{rest}")
        if stored is not None and len(stored.shape) == 2:
            block = block_size(stored.shape[1])
            rounded = quantize_weight(read_tensor(stored), kind="int4", dtype="float32", block=block)
            values = rounded.dequantized().numpy()
        value.const_value = ir.tensor(values, name=name)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_quantized_range_computes_with_exactly_the_rounded_weights(
    quantized: Bundle, reduced_bundle: Path, checkpoint: Path
) -> None:
    spec = quantized.manifest.graph("suffix").split()[0]  # without its probe
    sizes = spec.profiles[0].sizes
    random = np.random.default_rng(0)
    inputs = {
        tensor.name: random.standard_normal([sizes.get(str(size), size) for size in tensor.shape]).astype(
            tensor.dtype
        )
        for tensor in spec.inputs
    }
    inputs["position_ids"] = np.arange(sizes["S"], dtype=np.int32)[None]
    inputs["past_length"] = np.zeros(1, np.int32)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 products
    session = ort.InferenceSession(quantized.path(spec.file), options, providers=["CPUExecutionProvider"])
    twin = twin_of("suffix", open_bundle(reduced_bundle), checkpoint)
    for got, expected in zip(session.run(None, inputs), twin.run(None, inputs)):
        np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_a_part_that_cannot_be_in_its_format_is_named_and_not_in_the_manifest(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=2, text_settings={"vocab_size": 101})
    warnings: list[str] = []
    options = ExportOptions(
        model=str(checkpoint),
        out=tmp_path / "out",
        schedule=Schedule(),
        quantize=parse_plan("head=int4,prefix=int8"),
        max_text=8,
    )
    with shared_traces():
        export_bundle(options, progress=Progress(warn=warnings.append))
    quantization = open_bundle(tmp_path / "out").manifest.quantization
    assert quantization is not None
    assert quantization.formats == {"prefix": "int8"}
    (warning,) = warnings
    assert "weights in head that int4 can store" in warning


def test_the_manifest_says_what_was_quantized_and_which_opset_it_took(quantized: Bundle) -> None:
    manifest = quantized.manifest
    assert manifest.quantization is not None
    assert manifest.quantization.method == "round-to-nearest"
    assert "select" not in manifest.quantization.formats  # probes are as their layers are
    assert {spec.name: spec.opset for spec in manifest.graphs} == {
        "vision": 21, "prefix": 21, "probe_1": 21, "select_1": None, "segment_1": 21, "probe_2": 21,
        "select_2": None, "suffix": 21, "head": 19, "gradient": None,
    }  # fmt: skip
    for spec in manifest.graphs:
        opset = ir.load(quantized.path(spec.file)).opset_imports[""]
        assert opset == (spec.opset or manifest.opset)


def test_a_quantized_probe_reads_the_weights_of_its_layer(quantized: Bundle) -> None:
    def places(graph: str) -> dict[str, int | None]:
        initializers = ir.load(quantized.path(f"{graph}.onnx")).graph.initializers
        return {
            name.partition("self_attn.")[2]: value.const_value.offset
            for name, value in initializers.items()
            if "k_proj.weight" in name and isinstance(value.const_value, ir.ExternalTensor)
        }

    assert places("probe_2") == places("suffix")
    assert set(places("suffix")) == {"k_proj.weight", "k_proj.weight" + SCALE_SUFFIX}


def test_the_bundle_holds_no_tensor_that_nothing_reads(quantized: Bundle, reduced_bundle: Path) -> None:
    def weight_bytes(bundle: Bundle) -> int:
        return sum(entry.num_bytes for entry in bundle.manifest.files if entry.path.endswith(".safetensors"))

    # float32 to 4 bits, one float32 scale for 16 to 64 of them, and norms, biases and patch embeddings as they were
    assert weight_bytes(quantized) < 0.25 * weight_bytes(open_bundle(reduced_bundle))


def test_a_quantized_bundle_answers(quantized: Bundle) -> None:
    from PIL import Image

    with Pipeline.from_bundle(quantized.folder, threads=1) as pipeline:
        answer = pipeline.generate(Image.new("RGB", (30, 24), "red"), "w1 w2", max_new_tokens=4)
        assert len(answer.text) > 0
        assert answer.statistics.kept_tokens == tuple(keep for _, keep in REDUCED_STAGES)


def test_tensorrt_builds_all_quantized_graphs(quantized: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    from tests.engine_bundles import build_here

    assert build_here(quantized, tmp_path).keys() == {graph.name for graph in quantized.manifest.graphs}
