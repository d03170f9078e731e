"""The windowed vision graph against Hugging Face: in torch, as an exported graph, and as a TensorRT engine."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tests.pictures import random_picture
from trio_edge.export.graphs.vision_windowed import (
    INV_FREQ_NAME,
    WindowedVision,
    inverse_frequencies,
)
from trio_edge.export.onnx_graph import attach_weights, dynamic_axes, example_input, save, trace
from trio_edge.export.tensorrt_check import require_supported
from trio_edge.runtime.image_patches import PatchProcessing
from trio_edge.runtime.manifest import StoredTensor, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

HIDDEN, OUT, WINDOW = 32, 24, 56
PROCESSING = PatchProcessing(patch_size=14, window_size=WINDOW, min_pixels=28 * 28, max_pixels=60 * 28 * 28)
SIZES = {
    "one_token": (28, 28),
    "one_window": (56, 56),
    "partly_filled_window": (40, 60),
    "full_windows": (224, 112),
    "border_windows": (150, 100),
    "one_row": (270, 20),
    "one_column": (30, 300),
}
LARGEST = PROCESSING.max_sizes()
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
"""Reordered sums of four blocks."""
FLOAT16 = {"rtol": 0.0, "atol": 2e-2}
"""Four blocks with float16 weights and activations; outputs are about 1."""


def vision_config(**changes: Any) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        **{
            "depth": 4, "hidden_size": HIDDEN, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": OUT,
            "fullatt_block_indexes": [1, 3], "window_size": WINDOW, **changes,
        }
    )  # fmt: skip


def hugging_face(config: Qwen2_5_VLVisionConfig) -> Qwen2_5_VisionTransformerPretrainedModel:
    """Random weights: numbers stay about 1, attention is far from uniform, norms and biases are not trivial."""
    torch.manual_seed(3)
    visual = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
    for name, parameter in visual.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        torch.nn.init.normal_(parameter, std=(1.4 if "qkv" in name else 1.0) / fan_in**0.5)
        if "norm" in name or "ln_q" in name:
            parameter.data += 1
    return visual.requires_grad_(False)


SMALL = {"depth": 2, "fullatt_block_indexes": [1]}
"""For what is exported: every kind of block once."""
VISUAL = hugging_face(vision_config())
SMALL_VISUAL = hugging_face(vision_config(**SMALL))
INV_FREQ = inverse_frequencies(VISUAL.config)
MODULE = WindowedVision(VISUAL, inv_freq=torch.from_numpy(INV_FREQ))


def expected(
    inputs: dict[str, NDArray[Any]],
    size: tuple[int, int],
    *,
    visual: Qwen2_5_VisionTransformerPretrainedModel = VISUAL,
) -> NDArray[np.float32]:
    """Hugging Face's visual tokens from the same patches, brought back into its own order."""
    num_tokens = PROCESSING.num_visual_tokens(*size)
    tokens = inputs["pixel_values"].reshape(-1, 4, PROCESSING.patch_values)
    pixels = torch.from_numpy(tokens[inputs["token_index"][:num_tokens]].reshape(-1, PROCESSING.patch_values))
    return visual(pixels, torch.tensor([[1, *PROCESSING.grid(*size)]])).pooler_output.numpy()


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("name", SIZES)
def test_visual_tokens_equal_hugging_face(name: str, padded: bool) -> None:
    size = SIZES[name]
    inputs = PROCESSING.prepare(random_picture(*size), LARGEST if padded else None)
    theirs = expected(inputs, size)
    ours = MODULE(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    assert ours.shape == (len(inputs["token_index"]), OUT)
    np.testing.assert_allclose(ours[: len(theirs)], theirs, **FLOAT32)


def test_window_attention_is_not_attention_over_the_picture() -> None:
    size = SIZES["border_windows"]
    inputs = PROCESSING.prepare(random_picture(*size))
    everywhere = WindowedVision(VISUAL, inv_freq=MODULE.encoder.inv_freq)
    everywhere.encoder.full_blocks = frozenset(range(4))
    ours = everywhere(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    assert np.abs(ours - expected(inputs, size)).max() > 0.1


def test_every_parameter_is_the_checkpoints_own() -> None:
    theirs = {id(parameter) for parameter in VISUAL.parameters()}
    assert {id(parameter) for parameter in MODULE.parameters()} == theirs
    assert [name for name, _ in MODULE.named_buffers()] == [INV_FREQ_NAME]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [-1]])
def test_values_of_padding_reach_no_token(rows: list[int]) -> None:
    inputs = PROCESSING.prepare(random_picture(100, 60))
    sizes = {axis: size + 8 for axis, size in PROCESSING.sizes(100, 60).items()}
    padded = PROCESSING.prepare(random_picture(100, 60), sizes)
    padded["pixel_values"][inputs["num_patches"][0] :][rows] = 100.0
    ours = MODULE(*(torch.from_numpy(array) for array in padded.values())).numpy()
    np.testing.assert_allclose(ours[: len(inputs["token_index"])], expected(inputs, (100, 60)), **FLOAT32)


def io_tensors(dtype: str) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    shapes: dict[str, tuple[int | str, ...]] = {
        "patch_positions": (2, "P"),
        "window_slots": ("W", PROCESSING.slots_per_window),
        "patch_slot": ("P",),
        "num_patches": (1,),
        "token_index": ("N",),
    }
    pixels = TensorSpec(name="pixel_values", dtype="float32", shape=("P", PROCESSING.patch_values))
    indices = (TensorSpec(name=name, dtype="int32", shape=shape) for name, shape in shapes.items())
    return (pixels, *indices), (TensorSpec(name="visual_tokens", dtype=dtype, shape=("N", OUT)),)


@contextmanager
def default_dtype(dtype: str) -> Iterator[None]:
    """As trio-export sets it."""
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of a safetensors file lies."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: StoredTensor(
            file=path.name,
            dtype={"F32": "float32", "F16": "float16"}[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


@pytest.fixture(scope="module", params=["float32", "float16"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The graph as trio-export makes it: traced without values, weights outside."""
    folder, dtype = tmp_path_factory.mktemp("windowed"), request.param
    module = WindowedVision(SMALL_VISUAL, inv_freq=torch.from_numpy(INV_FREQ))
    values = {name: value.numpy().astype(dtype) for name, value in module.named_parameters()}
    save_file(values, folder / "weights.safetensors")
    inputs, outputs = io_tensors(dtype)
    sizes = {"P": 92, "W": 7, "N": 19}
    axes = dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
    with FakeTensorMode(), default_dtype(dtype):
        visual = Qwen2_5_VisionTransformerPretrainedModel(vision_config(**SMALL))
        model = trace(
            WindowedVision(visual, inv_freq=torch.empty(HIDDEN // 2 // 4, dtype=torch.float32)),
            args=tuple(example_input(tensor, trace_sizes=sizes) for tensor in inputs),
            dynamic_shapes=tuple(dynamic_axes(tensor, dims=axes) for tensor in inputs),
            inputs=inputs,
            outputs=outputs,
            opset=18,
        )
    stored = stored_tensors(folder / "weights.safetensors")
    attach_weights(model, stored, {INV_FREQ_NAME: INV_FREQ}, bundle=folder)
    save(model, folder / "vision.onnx")
    return folder / "vision.onnx", dtype


def test_exported_graph_equals_hugging_face_at_every_size(exported: tuple[Path, str]) -> None:
    path, dtype = exported
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for name, size in SIZES.items():
        for sizes in (None, LARGEST):
            inputs = PROCESSING.prepare(random_picture(*size), sizes)
            theirs = expected(inputs, size, visual=SMALL_VISUAL)
            (ours,) = session.run(None, inputs)
            tolerance = FLOAT32 if dtype == "float32" else FLOAT16
            np.testing.assert_allclose(ours[: len(theirs)], theirs, **tolerance, err_msg=name)


def test_exported_graph_holds_no_weights(exported: tuple[Path, str]) -> None:
    path, _ = exported
    model = onnx.load(path, load_external_data=False)
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    assert max(np.prod(tensor.dims, dtype=int) for tensor in inside) <= 64
    outside = [tensor.name for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) == len(list(SMALL_VISUAL.parameters()))


def test_exported_graph_is_supported_by_the_tensorrt_of_both_jetpacks(exported: tuple[Path, str]) -> None:
    path, _ = exported
    onnx.checker.check_model(path)
    model = ir.from_proto(onnx.load(path, load_external_data=False))
    require_supported(model, name="vision", symbols={"P", "W", "N"})


def test_exported_graph_builds_in_tensorrt_with_two_profiles(exported: tuple[Path, str]) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    path, dtype = exported
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    for sizes in (LARGEST, PROCESSING.sizes(150, 100)):
        profile = builder.create_optimization_profile()
        for tensor in io_tensors(dtype)[0]:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
