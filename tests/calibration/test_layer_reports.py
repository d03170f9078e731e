"""What trio-calibrate says about a model's layers: values that float16 cannot hold, and saliency against the whole gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from tests.calibration.question_files import questions_about, write_questions
from trio_edge.calibration.model.gradients import agreement, agreements, whole_gradients
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.ranges import float16_warning, listening_to_ranges
from trio_edge.calibration.model.sequence import advanced, logits_of, saliency
from trio_edge.calibration.model.torch_model import TorchModel, load_model
from trio_edge.calibration.progress import StepProgress
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.calibration.search.calibrate import calibrate
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.output import summary_of
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.model.sequence import Sequence


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("samples"), questions_about(4))


@pytest.fixture(scope="module")
def question(samples: Path) -> Sample:
    return read_questions(samples)[0]


@pytest.fixture
def model(checkpoint: Path) -> TorchModel:
    return load_model(str(checkpoint))


@pytest.fixture
def prompt(model: TorchModel, question: Sample) -> Sequence:
    with torch.no_grad():
        return make_prompt(model, question)


def _run(model: TorchModel, prompt: Sequence) -> dict[str, float]:
    with torch.no_grad(), listening_to_ranges(model) as largest:
        logits_of(model, advanced(model, prompt, range(model.num_layers)).hidden_SD)
    return largest


def test_a_value_above_float16_is_named_in_one_line(model: TorchModel, prompt: Sequence) -> None:
    before = _run(model, prompt)
    assert float16_warning(before) is None
    weight = model.parts.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 1e6
    after = _run(model, prompt)
    name = "layers.1.mlp.down_proj"
    assert after[name] == pytest.approx(1e6 * before[name], rel=1e-3)
    assert after["layers.0.mlp.down_proj"] == before["layers.0.mlp.down_proj"]
    warning = float16_warning(after)
    assert warning is not None
    assert "layers.1" in warning
    assert "expected values up to 65504" in warning
    assert "--dtype float32" in warning
    assert "\n" not in warning


def test_the_inputs_of_products_count_too(model: TorchModel, prompt: Sequence) -> None:
    gate = model.parts.layers[0].mlp.gate_proj.weight
    down = model.parts.layers[0].mlp.down_proj.weight
    gate.data, down.data = gate.data * 1e6, down.data / 1e6  # only gate times up is large
    warning = float16_warning(_run(model, prompt))
    assert warning is not None
    assert warning.startswith("layers.0.mlp")


@pytest.mark.parametrize("rows", ["reference", "answer"])
def test_the_last_layers_saliency_is_the_whole_gradient(
    model: TorchModel, prompt: Sequence, rows: str
) -> None:
    schedule = Schedule(probe_rows="answer" if rows == "answer" else "reference")
    last = model.num_layers - 1
    whole_N = whole_gradients(model, prompt, schedule)[last]
    with torch.no_grad():
        entering = advanced(model, prompt, range(last))
        own_N = saliency(model, last, schedule, entering)
    torch.testing.assert_close(whole_N, own_N, rtol=1e-3, atol=1e-7)
    assert agreements(model, prompt, schedule)[last].spearman == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(whole_gradients(model, entering, schedule, last), [whole_N])


def test_the_whole_gradient_of_an_earlier_layer_is_that_of_a_small_step(
    model: TorchModel, prompt: Sequence
) -> None:
    """Along its own direction, a step changes the loss by its length times the gradient's."""
    schedule = Schedule()
    rows = list(range(prompt.prompt_length - 5, prompt.prompt_length - 1))

    def loss(hidden_SD: torch.Tensor, best_R: torch.Tensor | None) -> tuple[float, torch.Tensor]:
        after = advanced(model, replace(prompt, hidden_SD=hidden_SD), range(model.num_layers))
        logits_RV = logits_of(model, after.hidden_SD[rows])
        best_R = logits_RV.argmax(-1) if best_R is None else best_R
        return float(torch.nn.functional.cross_entropy(logits_RV, best_R)), best_R

    row = int(prompt.visual_rows_N[2])
    hidden_SD = prompt.hidden_SD.detach().requires_grad_()
    after = advanced(model, replace(prompt, hidden_SD=hidden_SD), range(model.num_layers))
    logits_RV = logits_of(model, after.hidden_SD[rows])
    (gradient_SD,) = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits_RV, logits_RV.argmax(-1)), hidden_SD
    )
    direction = torch.zeros_like(prompt.hidden_SD)
    direction[row] = gradient_SD[row] / gradient_SD[row].norm()
    with torch.no_grad():
        _, best_R = loss(prompt.hidden_SD, None)
        ahead, _ = loss(prompt.hidden_SD + 1e-2 * direction, best_R)
        back, _ = loss(prompt.hidden_SD - 1e-2 * direction, best_R)
    expected = (ahead - back) / 2e-2
    assert float(whole_gradients(model, prompt, schedule)[0][2]) == pytest.approx(expected, rel=0.05)


def test_agreement_is_about_order_and_the_best() -> None:
    one = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert agreement(one, 10 * one, num_keep=2) == pytest.approx((1.0, 1.0))
    assert agreement(one, -one, num_keep=2) == pytest.approx((-1.0, 0.0))
    assert agreement(one, torch.tensor([4.0, 1.0, 2.0, 3.0]), num_keep=2).overlap == 0.5


def test_a_calibration_reports_both(
    checkpoint: Path, samples: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trio_edge.calibration.model.ranges.LARGEST_FLOAT16", 0.5)
    warnings: list[str] = []
    options = CalibrationOptions(
        model=str(checkpoint),
        samples=str(samples),
        target="orin-nx-16",
        dtype="float16",
        max_kl=10.0,
        keeps=(0.3,),
        max_stages=1,
        nms_thresholds=(0.8,),
        evaluations=0,
        answer_tokens=1,
        max_new_tokens=8,
        gradients=1,
    )
    found = calibrate(options, progress=StepProgress(warn=warnings.append)).calibration
    assert found.largest_values["vision"] > 0
    assert [one.layer for one in found.gradients] == [0, 1, 2]
    assert found.gradients[-1].spearman.value == pytest.approx(1.0, abs=1e-3)
    assert found.whole_gradient is not None
    # One sample: its difference is the mean and both ends.
    assert found.whole_gradient.interval_95 == pytest.approx(2 * (found.whole_gradient.value,))
    assert abs(found.whole_gradient.value) > 0  # another choice of tokens
    assert sum("float16" in warning for warning in warnings) == 1
    summary = summary_of(found, tmp_path, exported=True)
    assert "rank correlation of the saliency" in summary
    assert "KL if the whole gradient chose: " in summary
