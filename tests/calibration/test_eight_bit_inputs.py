"""INT8 with INT8 inputs in a whole bundle: every product of vision, mergers, decoder and head rounds its inputs too."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.internvl_checkpoints import save_internvl_checkpoint
from tests.mistral3_checkpoints import save_mistral3_checkpoint
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CHECKPOINTS: dict[str, tuple[Callable[..., Path], int]] = {
    "qwen3-vl": (save_qwen3_vl_checkpoint, 4 * 4 + 2 * (1 + 3)),
    "internvl3.5": (partial(save_internvl_checkpoint, text_type="qwen3"), 3 * 6 + 2),
    "smolvlm": (save_smolvlm_checkpoint, 2 * 6 + 1),
    "mistral3": (save_mistral3_checkpoint, 3 * 7 + 3),
}
"""Products with weights in the vision graph: layers, and two for each merger (Qwen3-VL has one a plane too) or one projection."""
SCHEDULE = Schedule(stages=(Stage(layer=1, keep=3),), positions="preserved", probe_rows="answer")
NUM_LAYERS, PRODUCTS_OF_A_LAYER = 3, 7  # as many layers as planes, so that each plane is added


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    file = write_questions(tmp_path_factory.mktemp("samples"), questions_about(2))
    return read_questions(file, count=None, need_answers=False)


@pytest.fixture(scope="module", params=CHECKPOINTS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def bundle(family: str, questions: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    save, _ = CHECKPOINTS[family]
    folder = save(tmp_path_factory.mktemp(family) / "checkpoint", num_layers=NUM_LAYERS)
    model, plan = load_model(str(folder)), parse_plan("all=int8")
    found = calibrate_quantization(model, questions, SCHEDULE, plan, dtype="float16", num_tokens=2)
    assert found is not None
    return open_bundle(export(folder, schedule=SCHEDULE, scales=found.scales, quantize=plan, dtype="float16"))


def weighted_products(graph: ir.Graph) -> Iterator[tuple[str, str]]:
    """Yield what gives the inputs of each product with stored weights, and what gives the weights."""
    for node in graph:
        if node.op_type in ("MatMul", "Gemm"):
            rows, weights = map(origin, node.inputs[:2])
            if weights in ("DequantizeLinear", "stored"):
                yield rows, weights


def origin(value: ir.Value | None) -> str:
    """Return the operator that gives a value before changes of its form, or "stored", or "given" to the graph."""
    assert value is not None
    node = value.producer()
    if node is None:
        return "stored" if value.is_initializer() else "given"
    if node.op_type in ("Transpose", "Reshape", "Cast", "Unsqueeze", "Squeeze"):
        return origin(node.inputs[0])
    return node.op_type


def test_every_product_with_weights_rounds_its_inputs_but_the_patches(family: str, bundle: Bundle) -> None:
    assert bundle.manifest.quantization is not None
    assert set(bundle.manifest.quantization.inputs) == {"vision", "prefix", "suffix", "head"}
    _, of_vision = CHECKPOINTS[family]
    counts = {
        "vision": of_vision,
        "prefix": PRODUCTS_OF_A_LAYER,
        "suffix": 2 * PRODUCTS_OF_A_LAYER,
        "head": 1,
    }
    for name, count in counts.items():
        products = list(weighted_products(ir.load(bundle.path(f"{name}.onnx")).graph))
        rounded = [product for product in products if product == ("DequantizeLinear", "DequantizeLinear")]
        assert len(rounded) == count, name
        assert len(products) - len(rounded) <= (name == "vision")  # the patches' embedding


def test_the_bundle_answers(bundle: Bundle, questions: list[Sample]) -> None:
    with Pipeline.from_bundle(bundle.folder, threads=1) as pipeline:
        assert pipeline.generate(open_image(questions[0].images[0]), "w1 w2", max_new_tokens=3).text


def test_tensorrt_builds_every_graph(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    from tests.engine_bundles import build_here

    assert build_here(bundle, tmp_path).keys() == {graph.name for graph in bundle.manifest.graphs}
