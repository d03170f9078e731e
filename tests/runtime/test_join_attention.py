"""``join_attention`` keeps the numbers: computed in numpy layer by layer, the changed network gives what torch gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from trio_edge.export.graphs.attention import causal_mask, two_part_attention
from trio_edge.runtime.engines.package import TensorRT
from trio_edge.runtime.engines.passes import Network, join_attention

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

trt = pytest.importorskip(
    "tensorrt_rtx", reason="needs tensorrt-rtx, which has wheels for x86-64 Linux only; runs in CI"
)
HEADS, KV_HEADS, SIZE = 4, 2, 8
NAMES = ["query", "key", "value", "past_key", "past_value", "mask"]


class Attention(torch.nn.Module):
    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        query, key, value, past_key, past_value, mask = inputs
        past = past_key, past_value
        return two_part_attention(self, query, key, value, mask, scaling=0.5, past=past, present=[])[0]


def computed(network: Network, tensor: Any, values: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Return a tensor of a TensorRT network as NvInfer.h describes the layers of an attention; ``values`` has its inputs."""
    if tensor.name in values:
        return values[tensor.name]
    layer = network.maker(tensor)
    assert layer is not None
    operands = [computed(network, layer.get_input(index), values) for index in range(layer.num_inputs)]
    match layer.type.name:
        case "CONSTANT":
            return network.values(layer)
        case "CAST" | "IDENTITY":
            return operands[0].astype(trt.nptype(tensor.dtype))
        case "SHAPE":
            return np.array(operands[0].shape)
        case "ELEMENTWISE":
            return {"SUM": np.add, "PROD": np.multiply}[layer.op.name](*operands)
        case "CONCATENATION":
            layer.__class__ = trt.IConcatenationLayer
            return np.concatenate(operands, axis=layer.axis)
        case "MATRIX_MULTIPLY":
            layer.__class__ = trt.IMatrixMultiplyLayer
            assert layer.op0 == layer.op1 == trt.MatrixOperation.NONE
            return operands[0] @ operands[1]
        case "SOFTMAX":
            powers = np.exp(operands[0] - operands[0].max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)
        case "SHUFFLE":
            turned = operands[0].transpose(tuple(layer.first_transpose)[: operands[0].ndim])
            shape = tuple(tensor.shape) if layer.num_inputs == 1 else tuple(operands[1])
            second = tuple(layer.second_transpose)[: len(shape)]
            return turned.reshape([shape[second.index(axis)] for axis in range(len(shape))]).transpose(second)
    raise AssertionError(layer.type)


@pytest.mark.parametrize(
    ("new", "past"), [pytest.param(1, 5, id="decode"), pytest.param(3, 2, id="several rows")]
)
def test_joined_attention_computes_the_same(new: int, past: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = [(HEADS, new), *[(KV_HEADS, new)] * 2, *[(KV_HEADS, past)] * 2]
    tensors = [torch.randn(1, heads, rows, SIZE) for heads, rows in sizes]
    inputs = (*tensors, causal_mask(new, past, torch.tensor([past - 1])))
    file = tmp_path / "attention.onnx"
    program = torch.onnx.export(
        Attention().eval(), inputs, dynamo=True, opset_version=18, input_names=NAMES, verbose=False
    )
    assert program is not None
    program.save(file)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(file))
    tensorrt = TensorRT(backend="tensorrt-rtx", module=trt, version="")
    assert join_attention(Network(tensorrt, definition)) == 1
    values = {name: tensor.numpy() for name, tensor in zip(NAMES, inputs)}
    found = computed(Network(tensorrt, definition), definition.get_output(0), values)
    np.testing.assert_allclose(found, Attention()(*inputs).numpy(), rtol=1e-5, atol=1e-6)
