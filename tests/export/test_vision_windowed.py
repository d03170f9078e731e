"""The windowed vision graph against Hugging Face: in torch, as an exported graph, and as a TensorRT engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from tests.pictures import random_picture
from tests.windowed_vision import (
    ALL_BLOCKS,
    FEW_BLOCKS,
    OUT,
    PROCESSING,
    build_in_tensorrt,
    export_vision,
    hugging_face_tokens,
    in_order,
    inv_freq_of,
    random_vision_encoder,
)
from trio_edge.export.check.tensorrt import require_supported
from trio_edge.export.graphs.vision import windowed
from trio_edge.export.graphs.vision.windowed import INV_FREQ_NAME, WindowedVision
from trio_edge.runtime.bundle.manifest import TensorSpec

if TYPE_CHECKING:
    from pathlib import Path

    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

SIZES = {
    "one_token": (28, 28),
    "one_window": (56, 56),
    "partly_filled_window": (40, 60),
    "full_windows": (224, 112),
    "border_windows": (150, 100),
    "one_row": (270, 20),
    "one_column": (30, 300),
}
LARGEST = PROCESSING.any_image_sizes()[-1]
IN_BLOCKS = 10_000
"""Patches of which two heads have so many scores that each is computed alone."""
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "float16": {"rtol": 0.0, "atol": 2e-2}}
"""Reordered sums of a few blocks; in float16 weights and activations are rounded. Outputs are about 1."""


@pytest.fixture(scope="module")
def visual() -> Qwen2_5_VisionTransformerPretrainedModel:
    return random_vision_encoder(**ALL_BLOCKS)


@pytest.fixture(scope="module")
def module(visual: Qwen2_5_VisionTransformerPretrainedModel) -> WindowedVision:
    return WindowedVision(visual, inv_freq=inv_freq_of(visual), max_patches=LARGEST["P"])


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("name", SIZES)
def test_visual_tokens_equal_hugging_face(
    name: str, padded: bool, visual: Qwen2_5_VisionTransformerPretrainedModel, module: WindowedVision
) -> None:
    inputs = PROCESSING.prepare(random_picture(*SIZES[name]), LARGEST if padded else None)
    expected = hugging_face_tokens(visual, inputs, SIZES[name])
    tokens = module(*in_order(inputs)).numpy()
    assert tokens.shape == (len(inputs["token_index"]), OUT)
    np.testing.assert_allclose(tokens[: len(expected)], expected, **TOLERANCES["float32"])


def test_window_attention_is_not_attention_over_the_picture(
    visual: Qwen2_5_VisionTransformerPretrainedModel,
) -> None:
    size = SIZES["border_windows"]
    inputs = PROCESSING.prepare(random_picture(*size))
    everywhere = WindowedVision(visual, inv_freq=inv_freq_of(visual), max_patches=LARGEST["P"])
    everywhere.encoder.full_blocks = frozenset(range(ALL_BLOCKS["depth"]))
    tokens = everywhere(*in_order(inputs)).numpy()
    assert np.abs(tokens - hugging_face_tokens(visual, inputs, size)).max() > 0.1


def test_every_parameter_is_the_checkpoints_own(
    visual: Qwen2_5_VisionTransformerPretrainedModel, module: WindowedVision
) -> None:
    theirs = {id(parameter) for parameter in visual.parameters()}
    assert {id(parameter) for parameter in module.parameters()} == theirs
    assert [name for name, _ in module.named_buffers()] == [INV_FREQ_NAME]


def test_values_of_padding_reach_no_token(
    visual: Qwen2_5_VisionTransformerPretrainedModel, module: WindowedVision
) -> None:
    picture = random_picture(100, 60)
    sizes = {axis: size + 8 for axis, size in PROCESSING.sizes(100, 60).items()}
    inputs = PROCESSING.prepare(picture, sizes)
    inputs["pixel_values"][inputs["num_patches"][0] :] = 100.0
    tokens = module(*in_order(inputs)).numpy()
    expected = hugging_face_tokens(visual, PROCESSING.prepare(picture), (100, 60))
    np.testing.assert_allclose(tokens[: len(expected)], expected, **TOLERANCES["float32"])


def test_float16_holds_activations_beyond_its_range() -> None:
    visual = random_vision_encoder(**FEW_BLOCKS)
    for projection in (visual.blocks[-1].mlp.up_proj, visual.blocks[-1].mlp.down_proj):
        projection.weight.data *= 600
    inputs = PROCESSING.prepare(random_picture(100, 60))
    expected = hugging_face_tokens(visual, inputs, (100, 60))
    half = visual.half()
    assert not np.isfinite(hugging_face_tokens(half, inputs, (100, 60))).all()
    tokens = WindowedVision(half, inv_freq=inv_freq_of(half), max_patches=LARGEST["P"])(*in_order(inputs))
    np.testing.assert_allclose(tokens.numpy(), expected, **TOLERANCES["float16"])


@pytest.mark.parametrize("name", SIZES)
def test_attention_in_blocks_of_heads_equals_hugging_face(
    name: str,
    visual: Qwen2_5_VisionTransformerPretrainedModel,
    module: WindowedVision,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(windowed, "num_head_blocks", lambda num_heads, _num_patches: num_heads)
    inputs = PROCESSING.prepare(random_picture(*SIZES[name]), LARGEST)
    expected = hugging_face_tokens(visual, inputs, SIZES[name])
    tokens = module(*in_order(inputs)).numpy()
    np.testing.assert_allclose(tokens[: len(expected)], expected, **TOLERANCES["float32"])


@pytest.fixture(
    scope="module",
    params=[("float32", LARGEST["P"]), ("float32", IN_BLOCKS), ("float16", IN_BLOCKS)],
    ids=["float32", "float32_in_blocks", "float16_in_blocks"],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    dtype, max_patches = request.param
    path = export_vision(
        lambda visual, inv_freq: WindowedVision(visual, inv_freq=inv_freq, max_patches=max_patches),
        random_vision_encoder(**FEW_BLOCKS),
        tmp_path_factory.mktemp("windowed"),
        outputs=(TensorSpec(name="visual_tokens", dtype=dtype, shape=("N", OUT)),),
        dtype=dtype,
    )
    return path, dtype


def test_exported_graph_equals_hugging_face_at_every_size(exported: tuple[Path, str]) -> None:
    path, dtype = exported
    visual = random_vision_encoder(**FEW_BLOCKS)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, size in SIZES.items():
        for sizes in (None, LARGEST):
            inputs = PROCESSING.prepare(random_picture(*size), sizes)
            expected = hugging_face_tokens(visual, inputs, size)
            (tokens,) = session.run(None, inputs)
            np.testing.assert_allclose(tokens[: len(expected)], expected, **TOLERANCES[dtype], err_msg=name)


def test_scores_over_a_large_picture_are_computed_head_by_head(
    exported: tuple[Path, str], request: pytest.FixtureRequest
) -> None:
    path, _ = exported
    in_windows, over_the_picture = 1, 2 if request.node.callspec.id.endswith("in_blocks") else 1
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert [node.op_type for node in nodes].count("Softmax") == in_windows + over_the_picture


def test_exported_graph_holds_no_weights(exported: tuple[Path, str]) -> None:
    path, _ = exported
    initializers = onnx.load(path, load_external_data=False).graph.initializer
    assert max(np.prod(tensor.dims, dtype=int) for tensor in initializers if not tensor.external_data) <= 64
    outside = [tensor for tensor in initializers if tensor.external_data]
    assert len(outside) == len(list(random_vision_encoder(**FEW_BLOCKS).parameters()))


def test_exported_graph_is_supported_by_the_tensorrt_of_both_jetpacks(exported: tuple[Path, str]) -> None:
    path, _ = exported
    onnx.checker.check_model(path)
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    require_supported(model, name="vision", symbols={"P", "W", "N"})


def test_exported_graph_builds_in_tensorrt_with_two_profiles(exported: tuple[Path, str]) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    path, _ = exported
    assert build_in_tensorrt(trt, path, (LARGEST, PROCESSING.sizes(150, 100))) is not None
