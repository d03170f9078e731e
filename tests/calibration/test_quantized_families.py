"""Calibrated vision towers, projectors, decoders and heads of every family: factors that move, and what the bundle computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.calibration.quantized_graphs import TracedEnds, traced_ends, write_quantized
from tests.calibration.question_files import questions_about, write_questions
from tests.calibration.smoothing import apply_smoothing
from tests.checkpoints import save_checkpoint
from tests.internvl_checkpoints import save_internvl_checkpoint
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint
from tests.minicpm_checkpoints import save_minicpm_checkpoint
from tests.mistral3_checkpoints import save_mistral3_checkpoint
from tests.onevision_checkpoints import save_onevision_checkpoint
from tests.qwen_checkpoints import save_qwen3_5_checkpoint, save_qwen3_vl_checkpoint, save_qwen_checkpoint
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.torch_model import TorchModel, load_model
from trio_edge.calibration.quantize.calibrating import Quantized as Found
from trio_edge.calibration.quantize.calibrating import calibrate_quantization, smoothing_of
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.quantize.sections import quantized_sections
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.export.quantize.plan import QuantizePlan, parse_plan
from trio_edge.export.quantize.store import StoredForm
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.engines.child import optimization_profile
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from trio_edge.runtime.bundle.manifest import GraphSpec

CLIP = partial(save_checkpoint, text="qwen2", random_biases=True)
CHECKPOINTS: dict[str, Callable[..., Path]] = {
    "llava-next": partial(CLIP, num_kv_heads=4, tie=True),
    "qwen2.5-vl": save_qwen_checkpoint,
    "qwen3-vl": save_qwen3_vl_checkpoint,
    "qwen3.5": save_qwen3_5_checkpoint,
    "internvl": save_internvl_checkpoint,
    "llava-onevision": save_onevision_checkpoint,
    "smolvlm": save_smolvlm_checkpoint,
    "mistral3": save_mistral3_checkpoint,
    "lfm2-vl": save_lfm2_vl_checkpoint,
    "minicpm-v": save_minicpm_checkpoint,
}
ATTENTION, GATED_MLP = ["qkv", "o"], ["gate_up", "down"]
MOVABLE = {
    "llava-next": ([*ATTENTION, "fc1"], [*ATTENTION, *GATED_MLP]),
    "qwen2.5-vl": ([*ATTENTION, *GATED_MLP], ["qkv", *GATED_MLP]),  # grouped queries in the decoder
    "qwen3-vl": ([*ATTENTION, "fc1", "plane_0_1"], ["qkv", *GATED_MLP]),
    "qwen3.5": (
        [*ATTENTION, "fc1"],
        ["down"],
    ),  # weights of its norms are differences to 1, which take no factor
    "internvl": ([*ATTENTION, "fc1", "projector_1"], ["qkv", *GATED_MLP]),
    "llava-onevision": ([*ATTENTION, "fc1"], ["qkv", *GATED_MLP]),
    "smolvlm": ([*ATTENTION, "fc1"], ["qkv", *GATED_MLP]),
    "lfm2-vl": ([*ATTENTION, "fc1", "projector_1"], ["in", *GATED_MLP]),
    "minicpm-v": ([*ATTENTION, "fc1", "merger_qkv", "merger_o", "merger_1", "projector_1"], ["down"]),
    "mistral3": (["projector_1", *ATTENTION, *GATED_MLP], ["qkv", *GATED_MLP]),
}
"""Groups that factors can move out of, of the vision graph and of the decoder."""


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    file = write_questions(tmp_path_factory.mktemp("samples"), questions_about(2))
    return read_questions(file, count=None, need_answers=False)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return CHECKPOINTS[family](tmp_path_factory.mktemp(family) / "checkpoint", num_layers=1)


def first_logits(model: TorchModel, question: Sample) -> torch.Tensor:
    with torch.inference_mode():
        prompt = make_prompt(model, question)
        return greedy_answer(model, prompt, Schedule(), max_tokens=1).logits_TV[0]


def test_factors_move_where_the_model_stays_as_it_was(
    family: str, folder: Path, questions: list[Sample]
) -> None:
    model = load_model(str(folder))
    before = first_logits(model, questions[0])
    generator = torch.Generator().manual_seed(3)
    found = []
    movable: dict[str, list[str]] = {"vision": [], "decoder": [], "head": []}
    for section in quantized_sections(model, Schedule(), parse_plan("all=int8")):
        for group in section.groups:
            if group.can_smooth:
                found.append((group, 0.3 + 2.0 * torch.rand(group.num_inputs, generator=generator)))
                movable[section.part].append(group.name)
    names = {part: list(dict.fromkeys(of_part)) for part, of_part in movable.items()}
    assert (names["vision"], names["decoder"]) == MOVABLE[family]
    assert names["head"] == ([] if family in ("qwen3.5", "minicpm-v") else ["lm_head"])
    apply_smoothing(model, smoothing_of(found, names=model.tensor_names()))
    torch.testing.assert_close(first_logits(model, questions[0]), before, rtol=1e-3, atol=1e-3)


OLD_ONNX_RUNTIME = tuple(map(int, ort.__version__.split(".")[:2])) < (1, 24)
"""Python 3.10 has no later one. It makes a QGemm that it cannot run; the runtime keeps it from that, too."""


@dataclass(frozen=True)
class Quantized:
    """One family in one format."""

    kind: str
    plan: QuantizePlan
    model: TorchModel
    found: Found
    forms: tuple[StoredForm, ...]
    specs: list[GraphSpec]
    folder: Path
    """Holds vision.onnx and head.onnx."""


@pytest.fixture(scope="module")
def traced(folder: Path, questions: list[Sample]) -> TracedEnds:
    return traced_ends(folder, open_image(questions[0].images[0]).size)


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantized(
    request: pytest.FixtureRequest,
    folder: Path,
    traced: TracedEnds,
    questions: list[Sample],
    tmp_path_factory: pytest.TempPathFactory,
) -> Quantized:
    model, plan = load_model(str(folder)), parse_plan(f"all={request.param}")
    found = calibrate_quantization(model, questions, Schedule(), plan, dtype="float32", num_tokens=2)
    assert found is not None
    out = tmp_path_factory.mktemp("quantized")
    forms, specs = write_quantized(traced, plan, found.scales, out)
    return Quantized(request.param, plan, model, found, forms, specs, out)


def run(quantized: Quantized, graph: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the outputs of a graph as the runtime's sessions compute them."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 products
    session = ort.InferenceSession(
        quantized.folder / f"{graph}.onnx",
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["QDQSelectorActionTransformer"] if OLD_ONNX_RUNTIME else [],
    )
    return [torch.from_numpy(output) for output in session.run(None, inputs)]


def as_bundle(quantized: Quantized) -> AbstractContextManager[None]:
    return quantized_model(
        quantized.model, Schedule(), quantized.plan, quantized.found.scales, dtype="float32"
    )


def assert_same(got: torch.Tensor, expected: torch.Tensor, in_float: torch.Tensor, kind: str) -> None:
    """Compare by what the rounding changed: a last bit can carry inputs over the edge between two of 256 values."""
    tolerance = 1e-3 if kind == "int4" else 0.3  # one such input made 0.12
    assert (got - expected).abs().mean() < tolerance * (expected - in_float).abs().mean()


def test_the_vision_graph_computes_what_its_torch_twin_does(
    quantized: Quantized, questions: list[Sample]
) -> None:
    model, picture = quantized.model, open_image(questions[0].images[0])
    graph: Any = model.parts.vision
    inputs = model.images.prepare(picture, model.images.sizes(*picture.size))
    tensors = [torch.from_numpy(inputs[spec.name]) for spec in graph.inputs]

    def outputs() -> tuple[torch.Tensor, ...]:
        result = graph.module(*tensors)
        return (result,) if isinstance(result, torch.Tensor) else result

    with torch.inference_mode():
        in_float = outputs()
        with as_bundle(quantized):
            expected = outputs()
        assert all(map(torch.equal, outputs(), in_float))  # it is given back
    got = run(quantized, "vision", inputs)
    assert len(got) == len(expected)
    for tensors_of_one in zip(got, expected, in_float):
        assert_same(*tensors_of_one, quantized.kind)


def test_the_head_computes_what_its_torch_twin_does(quantized: Quantized) -> None:
    model = quantized.model
    hidden = torch.randn(
        1, 8, model.parts.text_config.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    with torch.inference_mode():
        in_float = model.head(hidden[0, 5:6])
        with as_bundle(quantized):
            expected = model.head(hidden[0, 5:6])
    inputs = {"hidden_states": hidden.numpy(), "last_row": np.array([5], np.int32)}
    got, *_ = run(quantized, "head", inputs)
    if any(one.part == "head" for one in quantized.found.report.errors):
        assert_same(got, expected, in_float, quantized.kind)
    else:  # INT4 needs an even vocabulary
        assert model.parts.lm_head.get_parameter("weight").shape[0] % 2 == 1
        torch.testing.assert_close(got, in_float, rtol=1e-4, atol=1e-4)


def test_every_linear_layer_of_vision_and_head_is_calibrated(quantized: Quantized) -> None:
    model, plan = quantized.model, quantized.plan
    names = model.tensor_names()
    groups = [
        (section.part, group)
        for section in quantized_sections(model, Schedule(), plan)
        for group in section.groups
    ]
    ends = [group for part, group in groups if part != "decoder"]
    weights = {names[linear.get_parameter("weight")] for group in ends for linear in group.linears}
    assert {form.name for form in quantized.forms if form.kind != "none"} == weights
    errors = quantized.found.report.errors
    assert [(one.part, one.layer, one.group) for one in errors] == [
        (part, group.layer, group.name) for part, group in groups
    ]
    assert any(one.moved for one in errors if one.part == "vision")
    assert all(0.0 < one.calibrated < 0.03 for one in errors)
    nodes = [
        node.op_type
        for graph in ("vision", "head")
        for node in ir.load(quantized.folder / f"{graph}.onnx").graph
    ]
    assert nodes.count("QuantizeLinear") == (0 if quantized.kind == "int4" else len(ends))
    assert nodes.count("DequantizeLinear") == len(weights) + nodes.count("QuantizeLinear")


def test_tensorrt_builds_vision_and_head(quantized: Quantized) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    for spec in quantized.specs:
        logger = trt.Logger(trt.Logger.ERROR)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(quantized.folder / spec.file))
        config = builder.create_builder_config()
        config.add_optimization_profile(optimization_profile(builder, spec, spec.profiles[0]))
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM86, 0)
        assert builder.build_serialized_network(network, config) is not None, spec.name
