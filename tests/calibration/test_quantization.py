"""Calibrated quantization: what is listened to, that moved factors change nothing, and that found ones lessen the error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.bundles import INT8_CACHES
from tests.calibration.question_files import questions_about, write_questions
from tests.calibration.smoothing import apply_smoothing
from tests.checkpoints import save_checkpoint
from tests.decode_logits import record_logits
from tests.shared_traces import shared_traces
from trio_edge.calibration.model.greedy import MeasuredSchedule, greedy_answer, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import run_layer
from trio_edge.calibration.model.torch_model import TorchModel, load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization, smoothing_of
from trio_edge.calibration.quantize.collecting import (
    CachedRows,
    answer_samples,
    listening_to_caches,
    listening_to_inputs,
)
from trio_edge.calibration.quantize.quantized_model import measure_quantized, quantized_model
from trio_edge.calibration.quantize.rounding import (
    LARGEST_FACTOR,
    GroupRounding,
    awq_factors,
    smoothquant_factors,
)
from trio_edge.calibration.quantize.sections import quantized_sections
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.calibration.search.measuring import measure
from trio_edge.export.graphs.linear_groups import LinearGroup, decoder_groups
from trio_edge.export.quantize.numerics import block_size, quantize_weight
from trio_edge.export.quantize.plan import QuantizePlan, parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

SCHEDULE = Schedule(stages=(Stage(layer=1, keep=5),))
MANY_ROWS = 1 << 20
PLAN = "int4,prefix=int8,select=int4,vision=int8,head=int4,kv=int8"


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("samples"), questions_about(4))


@pytest.fixture(scope="module")
def questions(samples: Path) -> list[Sample]:
    return read_questions(samples, count=None, need_answers=False)


def logits_of(model: TorchModel, question: Sample, schedule: Schedule) -> torch.Tensor:
    with torch.inference_mode():
        prompt = make_prompt(model, question)
        return greedy_answer(model, prompt, schedule, max_tokens=3).logits_TV


def test_layers_behind_a_stage_are_listened_to_with_fewer_tokens_and_the_head_where_it_is_read(
    checkpoint: Path, questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_edge.calibration.quantize.collecting.NUM_ROWS", MANY_ROWS)
    model, one = load_model(str(checkpoint)), questions[:1]
    with torch.inference_mode():
        prompt = make_prompt(model, one[0])
    sections = quantized_sections(model, SCHEDULE, parse_plan("int8,head=int8"))
    with listening_to_inputs(sections, num_samples=1) as found:
        answer_samples(model, one, SCHEDULE, num_tokens=3)
    assert [group.name for group in sections[0].groups] == ["qkv", "o", "gate_up", "down"]
    *rows, head_rows = [
        len(section[0].all_rows()) - 1 for section in found
    ]  # the last one holds the largest values
    new_tokens = rows[0] - len(prompt.hidden_SD)
    assert new_tokens == 2
    assert rows[1:] == [rows[0] - len(prompt.visual_rows_N) + 5] * 2
    assert head_rows == 1 + new_tokens  # neither the prompt's other rows nor the probe's
    for section in found:
        for inputs in section:
            *every, largest = inputs.all_rows()
            assert torch.equal(torch.stack(every).abs().amax(0), largest)
    assert len(found[0][3].all_rows()[0]) == 96


def test_of_very_many_outputs_an_even_share_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trio_edge.calibration.quantize.rounding.MAX_OUTPUTS", 4)
    first, second = torch.nn.Linear(16, 6), torch.nn.Linear(16, 6)
    group = LinearGroup(name="gate_up", layer=0, linears=(first, second), before=None)
    looked_at = GroupRounding.of(group, torch.zeros(2, 16), kind="int8", dtype="float32").weight_OI
    assert torch.equal(looked_at, torch.cat([first.weight[::3], second.weight[::3]]))


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_factors_lessen_the_error_where_some_inputs_are_large(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    rows = torch.randn(40, 64, generator=generator) * torch.where(torch.arange(64) % 16 == 0, 30.0, 1.0)

    def error(factors: torch.Tensor) -> float:
        rounded = quantize_weight(
            weight * factors, kind=kind, dtype="float32", block=16 if kind == "int4" else None
        )
        inputs = rows / factors
        if kind == "int8":
            scale = inputs.abs().max() / 127
            inputs = torch.round(inputs / scale) * scale
        return float((inputs @ rounded.dequantized().T - rows @ weight.T).square().mean())

    factors = (
        awq_factors(weight, rows, block=16)
        if kind == "int4"
        else smoothquant_factors(weight, rows, alpha=0.5)
    )
    assert factors.shape == (64,)
    assert error(factors) < 0.7 * error(torch.ones(64))


def test_quantized_layers_differ_by_their_rounding_and_are_given_back(
    checkpoint: Path, questions: list[Sample]
) -> None:
    model = load_model(str(checkpoint))
    parameters = [parameter.clone() for layer in model.parts.layers for parameter in layer.parameters()]
    with torch.inference_mode():
        whole = keep_all(model, make_prompt(model, questions[0]), num_tokens=3)
        expected = dict(measure(model, whole, [SCHEDULE]))[SCHEDULE]

    def measured(
        plan: str,
        scales: CalibratedScales = CalibratedScales(),  # noqa: B008
        schedule: Schedule = Schedule(),  # noqa: B008
    ) -> MeasuredSchedule:
        (result,) = measure_quantized(
            model,
            questions[:1],
            schedule,
            parse_plan(plan),
            scales,
            dtype="float32",
            num_tokens=3,
        )
        return result

    assert measured("none", schedule=SCHEDULE).kl == pytest.approx(expected.kl, rel=1e-4)
    in_eight, in_four = measured("int8"), measured("int4")
    assert 0.0 < in_eight.kl < 0.1 * in_four.kl
    assert measured("int8", schedule=SCHEDULE).kl != pytest.approx(expected.kl, rel=1e-4)
    coarse = CalibratedScales(activation_max={"language_model.layers.0.mlp.down_proj.weight": 1e6})
    assert measured("int8", coarse).kl > 10 * in_eight.kl  # the inputs of this layer are rounded to nothing
    again = [parameter for layer in model.parts.layers for parameter in layer.parameters()]
    assert all(torch.equal(before, after) for before, after in zip(parameters, again, strict=True))
    assert measured("none").kl == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "plan", "outside", "inside"),
    [
        ("trio", "int4,head=int4,select=int8", "int4", "int4"),
        ("trio", "int4,head=int4", "int4", "int4"),
        ("trio", "select=int4", "none", "none"),
        ("fastv", "int4,head=int4,select=int8", "int8", "int4"),
        ("fastv", "int4,head=int4", "none", "int4"),
    ],
)
def test_a_selection_reads_its_layer_and_the_head_as_its_graphs_have_them(
    method: str, plan: str, outside: Any, inside: Any, checkpoint: Path, questions: list[Sample]
) -> None:
    schedule = Schedule(stages=(Stage(layer=1, keep=5),), method=method)
    model = load_model(str(checkpoint))
    layers: Any = model.parts.layers
    modules = {layers[1]: layers[1].mlp.down_proj, model.head: model.parts.lm_head}
    own = {linear: linear.weight.detach().clone() for linear in modules.values()}

    def rounded(linear: Any, kind: Any) -> torch.Tensor:
        weight = own[linear]
        block = block_size(weight.shape[1]) if kind == "int4" else None
        return (
            weight
            if kind == "none"
            else quantize_weight(weight, kind=kind, dtype="float32", block=block).dequantized()
        )

    seen = {}
    with quantized_model(model, schedule, parse_plan(plan), CalibratedScales(), dtype="float32"):
        for module in modules:
            module.register_forward_pre_hook(
                lambda one, _inputs: seen.update({one: modules[one].weight.data})
            )
        logits_of(model, questions[0], SCHEDULE)
        for module, linear in modules.items():
            assert torch.equal(linear.weight, rounded(linear, outside))
            assert torch.equal(seen[module], rounded(linear, inside))
    assert all(torch.equal(linear.weight, weight) for linear, weight in own.items())


# ---------------------------------------------------------------------------------------------- KV caches


def largest_rows(model: TorchModel, question: Sample) -> list[CachedRows]:
    """Return what the caches hold after one answer of three tokens under ``SCHEDULE``."""
    with listening_to_caches(model.parts.layers) as found:
        logits_of(model, question, SCHEDULE)
    return found


def test_ranges_are_of_rotated_keys_and_of_values(checkpoint: Path, questions: list[Sample]) -> None:
    model = load_model(str(checkpoint))
    values: list[torch.Tensor] = []
    handle = (
        model.parts.layers[1]
        .get_submodule("self_attn.v_proj")
        .register_forward_hook(lambda _module, _inputs, result: values.append(result.detach()))
    )
    found = largest_rows(model, questions[0])
    handle.remove()
    assert found[1].range_of(None).value == pytest.approx(max(float(rows.abs().max()) for rows in values))
    with torch.inference_mode():
        sequence = make_prompt(model, questions[0])
        _, present = run_layer(model, sequence.hidden_SD, sequence.positions_AS, 0)
    prompt_alone = CachedRows()
    prompt_alone.add(*present)
    assert found[0].range_of(None).key >= prompt_alone.range_of(None).key > 0.0


def test_a_values_range_is_what_is_left_after_smoothing(tmp_path: Path, questions: list[Sample]) -> None:
    folder = save_checkpoint(tmp_path / "llama", num_layers=2, num_kv_heads=4)
    model = load_model(str(folder))
    layer: Any = model.parts.layers[1]
    _, o, *_ = decoder_groups(layer, index=1)
    factors = 0.3 + 2.0 * torch.rand(o.num_inputs, generator=torch.Generator().manual_seed(3))
    names = model.tensor_names()
    changes = smoothing_of([(o, factors)], names=names)
    value = changes[names[layer.self_attn.v_proj.weight]]
    predicted = largest_rows(model, questions[0])[1].range_of(value)
    apply_smoothing(model, changes)
    measured = largest_rows(model, questions[0])[1].range_of(None)
    assert predicted.value == pytest.approx(measured.value, rel=1e-4)
    assert predicted.key == pytest.approx(measured.key, rel=1e-4)


def test_answers_are_measured_as_a_bundle_with_int8_caches_gives_them(
    checkpoint: Path, int8_cache_bundle: Path, questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipeline.from_bundle(int8_cache_bundle, threads=1) as pipeline:
        seen = record_logits(pipeline, monkeypatch)
        answer = pipeline.generate(questions[0].images, questions[0].question, max_new_tokens=4)
        assert len(answer.text) > 0  # it is decoded now
        schedule, tokens = pipeline.manifest.schedule, answer.token_ids
        theirs = torch.from_numpy(np.stack([answer.first_logits, *seen]))
    model = load_model(str(checkpoint))
    with torch.inference_mode():
        prompt = make_prompt(model, questions[0])
        rounded, whole = (
            greedy_answer(model, prompt, schedule, max_tokens=4, given=tokens, caches=caches).logits_TV
            for caches in (INT8_CACHES.cache_max, ())
        )
    assert len(tokens) == 4
    torch.testing.assert_close(rounded, theirs, rtol=1e-3, atol=1e-3)
    assert (whole - theirs).abs().amax(1).min() > 0.02


def test_caches_alone_are_calibrated_without_model_optimizer(
    checkpoint: Path, questions: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    model = load_model(str(checkpoint))
    plan = parse_plan("kv=int8")
    found = calibrate_quantization(model, questions, SCHEDULE, plan, dtype="float32", num_tokens=2)
    assert found is not None
    assert found.report.errors == []
    assert found.scales.method == "round-to-nearest"
    assert [(one.key_max, one.value_max) for one in found.report.caches] == [
        (one.key, one.value) for one in found.scales.cache_max
    ]


# ---------------------------------------------------------------------------------------- trio-calibrate


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration with INT8 vision and prefix, INT4 suffix, probe and head, and INT8 KV caches. No test may change it."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    arguments = [str(checkpoint), "--samples", str(samples), "--target", "orin-nx-16", "--out", str(out)]
    arguments += [
        "--max-kl",
        "10",
        "--layers",
        "1",
        "--keeps",
        "30%",
        "--max-stages",
        "1",
        "--evaluations",
        "0",
    ]
    arguments += ["--answer-tokens", "2", "--max-new-tokens", "4", "--nms-thresholds", "0.8", "--quiet"]
    with shared_traces():
        assert cli_calibrate.main([*arguments, "--quantize", PLAN]) == 0
    return out


@pytest.fixture(scope="module")
def bundle(calibrated: Path) -> Bundle:
    return open_bundle(calibrated / "bundle")


def test_the_report_tells_the_error_of_every_group(calibrated: Path) -> None:
    content = json.loads((calibrated / "calibration.json").read_bytes())
    report = content["quantization"]
    assert report["samples"] == content["data"]["search"]
    assert report["method"] == "awq+smoothquant"
    errors = report["errors"]
    assert [(one["part"], one["layer"], one["group"]) for one in errors] == [
        *(("vision", layer, group) for layer in range(2) for group in ("qkv", "o", "fc1", "fc2")),
        *(("vision", None, group) for group in ("projector_1", "projector_2")),
        *(("decoder", layer, group) for layer in range(3) for group in ("qkv", "o", "gate_up", "down")),
        ("head", None, "lm_head"),
    ]
    first_stage = content["chosen"]["stages"][0][0]
    formats = ["int8"] * (10 + 4 * first_stage) + ["int4"] * (4 * (3 - first_stage) + 1)
    assert [one["format"] for one in errors] == formats
    assert all(0.0 < one["calibrated"] < 0.05 for one in errors)
    assert all(one["calibrated"] <= one["rounded"] for one in errors if one["format"] == "int4")
    assert any(one["moved"] for one in errors if one["format"] == "int4")
    assert [one["layer"] for one in report["caches"]] == [0, 1, 2]
    assert content["quantized_held_out"]["samples"] == content["data"]["held_out"]
    assert 0.0 < content["quantized_held_out"]["kl"]["value"] < 3.0  # the weights are random


def test_the_bundle_computes_with_what_was_found_and_answers(bundle: Bundle) -> None:
    quantization = bundle.manifest.quantization
    assert quantization is not None
    assert quantization.method == "awq+smoothquant"
    assert quantization.inputs == ("vision", "prefix")
    num_layers = {spec.name: spec.num_layers for spec in bundle.manifest.graphs}
    kinds = {
        graph: [node.op_type for node in ir.load(bundle.path(f"{graph}.onnx")).graph]
        for graph in ("vision", "prefix", "suffix", "select_1", "head")
    }
    assert kinds["vision"].count("QuantizeLinear") == 2 * 4 + 2
    assert (kinds["head"].count("QuantizeLinear"), kinds["head"].count("DequantizeLinear")) == (0, 1)
    # new keys and values; in the prefix the input of each group too
    assert kinds["prefix"].count("QuantizeLinear") == (2 + 4) * num_layers["prefix"]
    assert kinds["suffix"].count("QuantizeLinear") == 2 * num_layers["suffix"]
    assert kinds["select_1"].count("QuantizeLinear") == 0
    assert kinds["suffix"].count("DequantizeLinear") == (7 + 2 + 2) * num_layers["suffix"]
    assert bundle.manifest.kv_dtype == "int8"
    with Pipeline.from_bundle(bundle.folder, threads=1) as pipeline:
        from PIL import Image

        assert len(pipeline.generate(Image.new("RGB", (30, 24), "red"), "w1 w2").text) > 0


def test_tensorrt_builds_inputs_in_eight_bits(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    from tests.engine_bundles import build_here

    graphs = {"prefix", "select_1"}
    assert build_here(bundle, tmp_path, graphs=graphs).keys() == graphs


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_factors_keep_dead_inputs_and_stay_in_reach_of_float16(kind: Any) -> None:
    pytest.importorskip("modelopt", reason="is in the extra 'quantize'")
    generator = torch.Generator().manual_seed(0)
    weight_OI, rows_TI = (torch.randn(size, 64, generator=generator) for size in (16, 96))
    weight_OI[:, 1] = 0.0  # no output reads it
    rows_TI[:, 2] = 0.0  # no sample has it
    weight_OI[:, 3], rows_TI[:, 3] = 1e-5, 1e4
    rows_TI[:, 4] *= 1e-1
    weight_OI[:, 4] *= 1e2
    rounding = GroupRounding(
        weight_OI=weight_OI,
        rows_TI=torch.cat([rows_TI, rows_TI.abs().amax(0)[None]]),
        kind=kind,
        dtype="float16",
        block=64 if kind == "int4" else None,
    )
    for factors_I in rounding.candidates():
        assert factors_I[1:3].tolist() == [1.0, 1.0]
        assert 1 / LARGEST_FACTOR <= factors_I.min() <= 1.0 <= factors_I.max() <= LARGEST_FACTOR


@pytest.mark.parametrize("num_alive", [0, 1])
def test_fewer_than_two_inputs_have_no_factors(num_alive: int) -> None:
    rounding = GroupRounding(
        weight_OI=torch.ones(2, 16),
        rows_TI=(torch.arange(16) < num_alive).expand(5, 16).float(),
        kind="int8",
        dtype="float16",
        block=None,
    )
    assert rounding.candidates() == []


def test_nothing_is_calibrated_where_only_selection_and_table_are_quantized(checkpoint: Path) -> None:
    model = load_model(str(checkpoint))
    for plan in (QuantizePlan(), parse_plan("select=int8,embedding=int8")):
        assert calibrate_quantization(model, [], SCHEDULE, plan, dtype="float32", num_tokens=2) is None


def test_a_missing_library_is_told_before_samples_are_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    arguments = [str(checkpoint), "--samples", "nowhere", "--target", "orin-nx-16", "--quantize", "int4"]
    assert cli_calibrate.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "expected nvidia-modelopt to be installed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quantized_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    from tests.export.packed_checkpoints import write_packed

    write_packed(checkpoint, tmp_path / "packed", method="awq")
    with pytest.raises(CheckpointError, match="expected floating-point weights, got INT4"):
        load_model(str(tmp_path / "packed"))
