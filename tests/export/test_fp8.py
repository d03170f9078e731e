"""FP8: the numbers, graphs that compute with exactly these, what a calibration finds, and GPUs that have no FP8."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any, get_args

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.engine_bundles import GPU, HOST, copy_bundle
from trio_edge.calibration.model.sequence import run_layer
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.export import cli
from trio_edge.export.quantize.graph import SCALE_SUFFIX
from trio_edge.export.quantize.numerics import (
    activation_scale,
    quantize_weight,
    rounded_activations,
    stored_bytes,
)
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.profiling import cli as cli_profile
from trio_edge.profiling.predict.answer import predict
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import BackendError, ManifestError
from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.engines.build import BuildOptions, plan_build
from trio_edge.runtime.engines.cpu import CpuAccuracy, prepare_graphs
from trio_edge.runtime.engines.needs import build_needs
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 448.0
PLAN = parse_plan("all=fp8")
SCHEDULE = Schedule(stages=(Stage(layer=1, keep=14),))
GROUPS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
)
"""Linear layers of a decoder layer with one input each."""
RANGES = CalibratedScales(
    activation_max={
        f"language_model.layers.{layer}.{linear}.weight": 2.0 + 0.5 * layer + place
        for layer in range(3)
        for place, group in enumerate(GROUPS)
        for linear in group.split()
    }
)
"""All different but within a group; some inputs are larger."""


NEEDS_SELECTIONS = pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24),
    reason="onnxruntime 1.23, the last one for Python 3.10, reads no FP8 selections; runs on Python 3.11 and later",
)


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    """The shared checkpoint with all graphs in FP8, the inputs of decoder layers too. No test may change it."""
    return open_bundle(export(checkpoint, schedule=SCHEDULE, scales=RANGES, quantize=PLAN))


# ------------------------------------------------------------------------------------------------ numbers


def numbers() -> torch.Tensor:
    """Return one row whose scale is 1: every FP8 number, the middles between neighbours, and random ones."""
    exact = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    exact = np.unique(exact[np.isfinite(exact)])
    middles = (exact[1:] + exact[:-1]) / 2
    random = np.random.default_rng(0).standard_normal(4000).astype(np.float32) * 30
    return torch.from_numpy(np.concatenate([exact, middles, random.clip(-LARGEST, LARGEST)]))[None]


def test_weights_are_rounded_to_the_nearest_number_and_ties_to_even() -> None:
    values = numbers()
    rounded = quantize_weight(values, kind="fp8", dtype="float32")
    assert rounded.scales_OB.item() == 1.0
    expected = values.numpy().astype(ml_dtypes.float8_e4m3fn)  # another implementation's rounding
    assert np.array_equal(rounded.values_OI.view(torch.uint8).numpy(), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_rounded_weight_is_off_by_a_sixteenth_at_most(dtype: Any) -> None:
    weight = (
        torch.randn(8, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 8)[:, None]
    )
    rounded = quantize_weight(weight, kind="fp8", dtype=dtype)
    smallest_scale = 2.0**-14  # that float16 has with all its bits
    least = 2.0**-10 * (weight.abs().amax(1, keepdim=True) / LARGEST).clamp(min=smallest_scale)
    off = (rounded.dequantized().to(torch.float32) - weight).abs()
    assert (off <= torch.maximum(weight.abs() * 1.01 / 16, 1.01 * least)).all()


def test_rows_that_are_small_or_zero_stay_finite() -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-7, -3e-8], [6e4, 1.0]])
    rounded = quantize_weight(weight, kind="fp8", dtype="float16").dequantized()
    assert rounded.isfinite().all()
    assert torch.equal(rounded[0], torch.zeros(2, dtype=torch.float16))


def test_inputs_above_the_range_become_its_end() -> None:
    rounded = rounded_activations(torch.tensor([3.0, -1e30, torch.inf]), largest=2.0, kind="fp8")
    end = LARGEST * activation_scale(2.0, kind="fp8")
    assert rounded.tolist() == [end, -end, end]
    assert end == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.7, 3e4])
def test_the_scale_of_inputs_is_the_same_number_in_float16(largest: float) -> None:
    scale = activation_scale(largest, kind="fp8")
    assert float(np.float16(scale)) == scale >= np.finfo(np.float16).tiny


def test_bytes_are_what_onnx_reads(bundle: Bundle, checkpoint: Path) -> None:
    tensors = load_model(str(checkpoint)).parts.layers[0].state_dict()
    values, scales = stored_bytes(
        quantize_weight(tensors["mlp.down_proj.weight"], kind="fp8", dtype="float32"), kind="fp8"
    )
    found = ir.load(bundle.path("prefix.onnx")).graph.initializers
    name = next(name for name in found if name.endswith("down_proj.weight"))
    stored = [found[name].const_value, found[name + SCALE_SUFFIX].const_value]
    assert stored[0] is not None
    assert stored[1] is not None
    assert stored[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert np.array_equal(stored[0].numpy().view(np.uint8), values.view(torch.uint8).numpy())
    assert np.array_equal(stored[1].numpy(), scales.numpy())


# ------------------------------------------------------------------------------------------------- bundles


@pytest.mark.parametrize("graph", ["prefix", "suffix"])
def test_onnx_runtime_computes_a_range_as_the_torch_twin_does(
    graph: str, bundle: Bundle, checkpoint: Path
) -> None:
    spec = bundle.manifest.graph(graph).split()[0]  # without its probe
    num_rows = spec.profiles[0].sizes["S"]
    hidden = torch.randn(num_rows, 64, generator=torch.Generator().manual_seed(0))
    engine: Any = make_backend("onnxruntime", threads=1).load(bundle, [graph]).engines[graph]
    session: ort.InferenceSession = getattr(engine, "_pieces", [engine])[0]._open_session()
    inputs = {
        tensor.name: np.zeros([spec.profiles[0].sizes.get(str(n), n) for n in tensor.shape], tensor.dtype)
        for tensor in spec.inputs
    }
    inputs[spec.inputs[0].name] = hidden[None].numpy()
    inputs["position_ids"] = np.arange(num_rows, dtype=np.int32)[None]
    (got,) = session.run(["hidden_states_out"], inputs)

    model = load_model(str(checkpoint))
    positions = torch.arange(num_rows, dtype=torch.int32)[None]
    assert spec.first_layer is not None
    layers = range(spec.first_layer, spec.first_layer + spec.num_layers)

    def computed() -> np.ndarray[Any, Any]:
        rows = hidden
        for layer in layers:
            rows, _ = run_layer(model, rows, positions, layer)
        return rows.numpy()

    with torch.inference_mode():
        whole = computed()
        with quantized_model(model, SCHEDULE, PLAN, RANGES, dtype="float32"):
            twin = computed()
    scale = np.abs(twin).max()
    assert np.abs(whole - twin).max() > 0.02 * scale
    # A sum that differs in its last bit may round to the neighbouring number, a sixteenth away: a few elements.
    assert np.abs(got[0] - twin).mean() < 2e-4 * scale


def test_the_manifest_says_what_is_in_fp8_and_graphs_take_opset_19(bundle: Bundle) -> None:
    quantization = bundle.manifest.quantization
    assert quantization is not None
    assert quantization.formats == dict.fromkeys(set(PLAN.formats) - {"select"}, "fp8")
    assert quantization.inputs == ("prefix", "suffix")
    # the head's gradient reads the final norm only
    in_fp8 = [spec for spec in bundle.manifest.graphs if spec.weight_bytes and spec.name != "gradient"]
    assert {spec.opset for spec in in_fp8} == {19}
    stored = (bundle.folder / "weights" / "quantized.safetensors").read_bytes()
    header = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} == {"F8_E4M3", "F32", "I8"}, (
        "the host's rows are in INT8"
    )


@NEEDS_SELECTIONS
def test_a_bundle_in_fp8_answers(bundle: Bundle) -> None:
    with Pipeline.from_bundle(bundle.folder, threads=1) as pipeline:
        answer = pipeline.generate(Image.new("RGB", (30, 24), "red"), "w1 w2", max_new_tokens=4)
        assert len(answer.text) > 0
        assert answer.statistics.kept_tokens == (14,)


@NEEDS_SELECTIONS
def test_weights_that_are_dequantized_once_give_the_same_numbers(bundle: Bundle, tmp_path: Path) -> None:
    answers, left = [], []
    for accuracy in get_args(CpuAccuracy)[1:]:  # float32 dequantizes once, int8 in every run
        folder = copy_bundle(bundle.folder, tmp_path / accuracy)
        prepared = prepare_graphs(open_bundle(folder), accuracy=accuracy)
        nodes = [node for file in prepared.glob("*.onnx") for node in ir.load(file).graph]
        left.append(sum(node.op_type == "DequantizeLinear" for node in nodes))
        with Pipeline.from_bundle(folder, threads=1, cpu_accuracy=accuracy) as pipeline:
            image = Image.new("RGB", (30, 24), "red")
            answers.append(
                pipeline.generate(image, "w1 w2", max_new_tokens=4, num_logprobs=2, temperature=0).logprobs
            )
    assert left[0] < left[1]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("quantization", "formats", "prefix"), "fp7", "Invalid enum value 'fp7'"),
        (("quantization", "inputs"), ["tail"], "Invalid enum value 'tail'"),
        (
            ("token_embedding", "dtype"),
            "float8_e4m3fn",
            "expected float32 or float16 rows, or int8 rows with scales, got float8_e4m3fn",
        ),
    ],
    ids=["a format", "a part", "the embeddings' type"],
)
def test_a_manifest_with_a_wrong_type_is_refused(
    place: tuple[str, ...], value: Any, message: str, bundle: Bundle
) -> None:
    content = json.loads(json_from_manifest(bundle.manifest))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ManifestError, match=message) as caught:
        manifest_from_json(json.dumps(content).encode(), where="trio.json")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- calibration


def test_a_calibration_finds_ranges_without_factors_and_without_model_optimizer(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    model = load_model(str(checkpoint))
    questions = read_questions(write_questions(tmp_path, questions_about(3)))
    found = calibrate_quantization(
        model,
        questions,
        SCHEDULE,
        parse_plan("fp8"),
        dtype="float32",
        num_tokens=2,
    )
    assert found is not None
    assert found.scales.smoothing == {}
    assert found.scales.method == "round-to-nearest"
    assert set(found.scales.activation_max) == set(RANGES.activation_max)
    errors = found.report.errors
    assert len(errors) == 3 * len(GROUPS)
    assert {(one.format, one.moved) for one in errors} == {("fp8", False)}
    # weights and inputs lose a 1/16 at most, 1/28 in the mean: a thousandth of the square, twice with both
    assert all(2e-4 < one.rounded < one.calibrated < 4e-3 for one in errors)


# ------------------------------------------------------------------------------------- GPUs that have none


@pytest.mark.parametrize("capability", [86, 87])
def test_engines_for_a_gpu_without_fp8_are_refused_before_anything_is_built(
    capability: int, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_bundle(bundle.folder, tmp_path / "bundle")
    assert cli_build.main([str(folder), "--compute-capability", f"89,{capability}"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "expected compute capability 8.9 or later (Ada, Hopper, Blackwell, Jetson Thor)" in error
    assert "as vision, prefix, probe_1, suffix, head are" in error
    assert error.endswith(f"in FP8, got {capability / 10}; export with int8 in place of fp8")
    assert not (folder / "engines").exists()


def test_a_machine_whose_gpu_has_no_fp8_is_told_by_a_dry_run_too(bundle: Bundle) -> None:
    orin = dataclasses.replace(HOST, gpu=dataclasses.replace(GPU, name="Orin", compute_capability=87))
    (problem,) = build_needs(bundle, BuildOptions(), host=orin)["problems"]
    assert problem.startswith("Orin: expected compute capability 8.9")
    assert "in FP8, got 8.7" in problem
    with pytest.raises(BackendError, match=r"as head is in FP8, got 8\.7"):
        plan_build(bundle, BuildOptions(graphs=("head",)), host=orin)


def test_calibrating_for_a_device_without_fp8_ends_before_samples_are_read(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(checkpoint),
        "--samples",
        "nowhere",
        "--target",
        "orin-nx-16",
        "--quantize",
        "int8,head=fp8",
    ]
    assert cli_calibrate.main([*arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--target: expected compute capability 8.9 or later" in error
    assert "as head is in FP8, got 8.7 of jetson-orin-nx-16" in error
    assert not (tmp_path / "out").exists()


def test_exporting_for_a_device_without_fp8_warns(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trio_edge.export.bundle.trace_graphs", stop)
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--target", "rtx-3090"]
    assert cli.main([*arguments, "--keep", "all", "--quantize", "fp8", "--quiet"]) != 0
    assert "warning: --target: expected compute capability 8.9" in capsys.readouterr().err


def test_a_prediction_for_a_device_without_fp8_is_refused(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_profile.main([str(bundle.folder), "--predict", "rtx-4090,orin-nx-16"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "--predict: expected compute capability 8.9 or later" in error
    assert "got 8.7 of jetson-orin-nx-16" in error


def test_inputs_in_fp8_are_predicted_at_the_rate_of_fp8(bundle: Bundle) -> None:
    target, manifest = find_device("rtx-4090"), bundle.manifest
    assert target.fp8_flops == pytest.approx(2 * target.fp16_flops, rel=1e-3)
    setting = plan_for(manifest=manifest)
    fast = predict(setting, target)
    half = dataclasses.replace(setting.formats, inputs=frozenset())
    slow = predict(dataclasses.replace(setting, formats=half), target)
    for one, other in zip(fast.runs, slow.runs, strict=True):
        share = one.time.compute_seconds / other.time.compute_seconds
        if one.run.name in ("prefix", "suffix"):
            assert 0.5 < share < 0.8  # attention is in half precision
        else:
            assert share == 1.0


def test_tensorrt_builds_layers_and_probes_in_fp8_for_ada(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    copy = copy_bundle(bundle.folder, tmp_path / "bundle")
    arguments = ["--backend", "tensorrt-rtx", "--compute-capability", "89", "--quiet"]
    assert cli_build.main([str(copy), *arguments, "--graphs", "prefix,select_1"]) == 0
