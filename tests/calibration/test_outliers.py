"""INT4 with outlier columns in floating point: the bundle computes what torch does, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.decode_logits import record_logits
from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.export.cli import main as trio_export
from trio_edge.export.quantize.numerics import outlier_columns, quantize_weight
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

PLAN = parse_plan("int4,vision=int4,head=int4,outliers=20%")
SCHEDULE = Schedule(stages=(Stage(layer=1, keep=5),))


def test_columns_that_add_most_keep_their_values() -> None:
    generator = torch.Generator().manual_seed(0)
    rows_TI, weight_OI = (torch.randn(size, 64, generator=generator) for size in (20, 10))
    rows_TI[:, 5] *= 100
    weight_OI[:, 40] *= 100
    columns_K = outlier_columns(rows_TI, weight_OI, share=0.1)
    assert columns_K.tolist() == sorted(columns_K.tolist())
    assert len(columns_K) == 8  # a multiple of 8
    assert {5, 40} <= set(columns_K.tolist())
    rounded = quantize_weight(weight_OI, kind="int4", dtype="float32", block=16, columns_K=columns_K)
    assert torch.equal(rounded.dequantized()[:, columns_K], weight_OI[:, columns_K])
    others = weight_OI.index_fill(1, columns_K, 0.0)
    alone = quantize_weight(others, kind="int4", dtype="float32", block=16).dequantized()
    assert torch.equal(rounded.dequantized().index_fill(1, columns_K, 0.0), alone)


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    file = write_questions(tmp_path_factory.mktemp("samples"), questions_about(2))
    # The gradient of a quantized head reads rows in INT8, so near ties may differ: not so for this question.
    return read_questions(file, count=None, need_answers=False)[1]


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, question: Sample, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, CalibratedScales]:
    """A bundle, and what the calibration found."""
    model = load_model(str(checkpoint))
    found = calibrate_quantization(model, [question], SCHEDULE, PLAN, dtype="float32", num_tokens=2)
    assert found is not None
    return open_bundle(
        export(checkpoint, schedule=SCHEDULE, scales=found.scales, quantize=PLAN)
    ), found.scales


def test_a_bundle_answers_as_the_torch_model_with_the_same_columns(
    checkpoint: Path,
    made: tuple[Bundle, CalibratedScales],
    question: Sample,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, scales = made
    with Pipeline.from_bundle(bundle.folder, threads=1, cpu_accuracy="float32") as pipeline:
        seen = record_logits(pipeline, monkeypatch)
        answer = pipeline.generate(question.images, question.question, max_new_tokens=3)
        assert len(answer.text) > 0  # it is decoded now
        theirs, tokens = torch.from_numpy(np.stack([answer.first_logits, *seen])), answer.token_ids
    model, schedule = load_model(str(checkpoint)), bundle.manifest.schedule
    without = CalibratedScales(smoothing=scales.smoothing)
    with torch.inference_mode():
        for used, is_same in ((scales, True), (without, False)):
            with quantized_model(model, schedule, PLAN, used, dtype="float32"):
                prompt = make_prompt(model, question)
                ours = greedy_answer(model, prompt, schedule, max_tokens=len(tokens), given=tokens)
            if is_same:
                assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in answer.kept]
            assert torch.allclose(ours.logits_TV, theirs, rtol=1e-3, atol=1e-3) == is_same


def columns_of(graph: ir.Graph) -> list[Any]:
    return [value for name, value in graph.initializers.items() if name.endswith(".columns")]


def test_the_manifest_and_the_files_have_the_columns(made: tuple[Bundle, CalibratedScales]) -> None:
    bundle, scales = made
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.outliers == 0.2
    spec = bundle.manifest.graph("suffix")
    graph = ir.load(bundle.path(spec.split()[0].file)).graph
    gathers = [node for node in graph if node.op_type == "Gather" and node.inputs[1] in columns_of(graph)]
    assert len(gathers) == 4 * spec.num_layers  # q, k and v read one input, and so do gate and up
    assert len(columns_of(graph)) == 7 * spec.num_layers
    wanted = {tuple(columns_K.tolist()) for columns_K in scales.outliers.values()}
    assert all(value.const_value.numpy().tolist() in map(list, wanted) for value in columns_of(graph))


def test_tensorrt_builds_them(made: tuple[Bundle, CalibratedScales], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    from tests.engine_bundles import build_here

    graphs = {"suffix", "head"}
    assert build_here(made[0], tmp_path, graphs=graphs).keys() == graphs


def test_an_export_without_a_calibration_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--out", str(tmp_path / "out"), "--quantize", "int4,outliers=10%"]
    assert trio_export(arguments) == 2
    assert "expected outliers with columns from a calibration, got none" in capsys.readouterr().err
