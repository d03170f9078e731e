"""Small random vision encoders of Qwen2.5-VL, and their graphs exported as trio-export does it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.numpy import save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tests.shared_traces import trace_once
from trio_edge.export.graphs.assembly.onnx_graph import (
    attach_weights,
    dynamic_axes,
    example_input,
    save,
)
from trio_edge.export.graphs.vision.patches import inverse_frequencies
from trio_edge.export.graphs.vision.windowed import INV_FREQ_NAME
from trio_edge.runtime.bundle.manifest import StoredTensor, TensorSpec
from trio_edge.runtime.images.qwen import QwenImages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

OUT = 24
PROCESSING = QwenImages(patch_size=14, window_size=56, min_pixels=28 * 28, max_pixels=60 * 28 * 28)
ALL_BLOCKS = {"depth": 4, "fullatt_block_indexes": [1, 3]}
FEW_BLOCKS = {"depth": 2, "fullatt_block_indexes": [1]}
"""For what is exported: every kind of block once."""


def random_vision_encoder(**changes: Any) -> Qwen2_5_VisionTransformerPretrainedModel:
    """Return an encoder whose numbers stay about 1 and whose attention is far from uniform; nothing is 0 or 1."""
    torch.manual_seed(3)
    visual = Qwen2_5_VisionTransformerPretrainedModel(_config(**changes)).eval()
    for name, parameter in visual.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        torch.nn.init.normal_(parameter, std=(1.4 if "qkv" in name else 1.0) / fan_in**0.5)
        if "norm" in name or "ln_q" in name:
            parameter.data += 1
    return visual.requires_grad_(False)


def inv_freq_of(visual: Qwen2_5_VisionTransformerPretrainedModel) -> torch.Tensor:
    """Return the constant of the windowed graphs."""
    return torch.from_numpy(inverse_frequencies(visual))


def hugging_face_tokens(
    visual: Qwen2_5_VisionTransformerPretrainedModel, inputs: dict[str, NDArray[Any]], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Return Hugging Face's visual tokens from the patches of ``inputs``, brought back into its own order."""
    num_tokens = PROCESSING.sizes(*size)["N"]
    tokens = inputs["pixel_values"].reshape(-1, 4, PROCESSING.patch_values)
    pixels = torch.from_numpy(tokens[inputs["token_index"][:num_tokens]].reshape(-1, PROCESSING.patch_values))
    return visual(
        pixels, torch.tensor([[1, *(2 * count for count in PROCESSING.token_grid(*size))]])
    ).pooler_output.numpy()


INPUTS = (
    TensorSpec(name="pixel_values", dtype="float32", shape=("P", PROCESSING.patch_values)),
    TensorSpec(name="patch_positions", dtype="int32", shape=(2, "P")),
    TensorSpec(name="window_slots", dtype="int32", shape=("W", PROCESSING.slots_per_window)),
    TensorSpec(name="patch_slot", dtype="int32", shape=("P",)),
    TensorSpec(name="num_patches", dtype="int32", shape=(1,)),
    TensorSpec(name="token_index", dtype="int32", shape=("N",)),
)


def in_order(inputs: dict[str, NDArray[Any]]) -> list[torch.Tensor]:
    """Return the inputs as the module takes them."""
    return [torch.from_numpy(inputs[tensor.name]) for tensor in INPUTS]


def export_vision(
    graph: Callable[[nn.Module, torch.Tensor], nn.Module],
    visual: Qwen2_5_VisionTransformerPretrainedModel,
    folder: Path,
    *,
    outputs: tuple[TensorSpec, ...],
    dtype: str,
) -> Path:
    """Write ``vision.onnx``: traced without values, the weights of ``visual`` in a file next to it."""
    inv_freq = inverse_frequencies(visual)
    names = dict(graph(visual, torch.from_numpy(inv_freq)).named_parameters())
    save_file({name: value.numpy().astype(dtype) for name, value in names.items()}, folder / "w.safetensors")
    sizes = {"P": 148, "W": 7, "N": 19}
    axes = dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
    with FakeTensorMode(), _default_dtype(dtype):
        fake = Qwen2_5_VisionTransformerPretrainedModel(visual.config)
        model = trace_once(
            graph(fake, torch.empty(inv_freq.shape, dtype=torch.float32)),
            args=tuple(example_input(tensor, trace_sizes=sizes) for tensor in INPUTS),
            dynamic_shapes=tuple(dynamic_axes(tensor, dims=axes) for tensor in INPUTS),
            inputs=INPUTS,
            outputs=outputs,
            opset=18,
        )
    stored = _stored_tensors(folder / "w.safetensors")
    attach_weights(model, stored, {INV_FREQ_NAME: inv_freq}, bundle=folder)
    save(model, folder / "vision.onnx")
    return folder / "vision.onnx"


def build_in_tensorrt(trt: Any, path: Path, profiles: tuple[dict[str, int], ...]) -> Any:
    """Return the serialized engine of the graph at ``path``, or None."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for tensor in INPUTS:
            shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)
            profile.set_shape(tensor.name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


def _config(**changes: Any) -> Qwen2_5_VLVisionConfig:
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": OUT}
    return Qwen2_5_VLVisionConfig(**fields, window_size=PROCESSING.window_size, **changes)


@contextmanager
def _default_dtype(dtype: str) -> Iterator[None]:
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Return where each tensor of a safetensors file lies."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return {
        name: StoredTensor(
            file=path.name,
            dtype={"F32": "float32", "F16": "float16"}[entry["dtype"]],
            shape=tuple(entry["shape"]),
            offset=start + entry["data_offsets"][0],
        )
        for name, entry in json.loads(content[8:start]).items()
    }
