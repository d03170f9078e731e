"""Attention of a few rows equals that of Hugging Face's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer

from tests.reference.saliency import rms_norm
from tests.reference.stage_selectors import attention_of_row
from tests.trio.decoder_layers import SCALED, merged_rotary_tables, random_decoder, rotary_tables
from tests.trio.selectors.stage_graph import CASES, build
from trio_edge.trio.selectors.stages.row_attention import RowAttention

LENGTH, PADDED, ROWS = 19, 25, [0, 7, 18]
LAYERS = {
    "qwen3 with norms of heads": ("qwen3", {"num_kv_heads": 2}),
    "llama": ("llama", {}),
    "llama grouped-query": ("llama", {"num_kv_heads": 2}),
    "mistral with a window": ("mistral", {"num_kv_heads": 1, "sliding_window": 6}),
    "ministral3 with scaled queries": ("ministral3", {"num_kv_heads": 2, **SCALED}),
    "qwen2 with biases": ("qwen2", {"num_kv_heads": 2}),
}


def _attend(layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    length, positions = torch.tensor([LENGTH], dtype=torch.int32), torch.arange(PADDED)
    return RowAttention(layer)(hidden, cos, sin, torch.tensor(ROWS), length, positions)


@pytest.mark.parametrize(("family", "config"), LAYERS.values(), ids=LAYERS.keys())
def test_rows_equal_hugging_faces_eager_attention(family: str, config: dict[str, Any]) -> None:
    layer = random_decoder(family, **config).layer
    layer.self_attn.config._attn_implementation = "eager"
    hidden, (cos, sin) = torch.randn(PADDED, 64).double(), rotary_tables(torch.arange(PADDED))
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    hidden_by = (distance < 0) | (distance >= config.get("sliding_window", LENGTH))
    mask = torch.zeros(LENGTH, LENGTH).double().masked_fill(hidden_by, -1e30)
    _, expected = layer.self_attn(
        rms_norm(hidden[:LENGTH], layer.input_layernorm)[None],
        position_embeddings=(cos[None, :LENGTH], sin[None, :LENGTH]),
        attention_mask=mask[None, None],
        position_ids=torch.arange(LENGTH)[None],
    )
    got = _attend(layer, hidden, cos, sin)
    # Hugging Face computes the softmax in float32.
    torch.testing.assert_close(
        got[:, :, :LENGTH], expected[0][:, ROWS].transpose(0, 1).double(), rtol=1e-5, atol=1e-7
    )
    assert (got[:, :, LENGTH:] == 0).all()


def test_qwen2_5_vl_layers_with_tables_of_three_axes_equal_the_reference() -> None:
    torch.manual_seed(3)
    settings = Qwen2_5_VLTextConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
        vocab_size=50, rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    )  # fmt: skip
    layer = Qwen2_5_VLDecoderLayer(settings, 0).double().requires_grad_(False)
    hidden, positions = torch.randn(PADDED, 64).double(), torch.randint(0, 30, (3, PADDED))
    cos, sin = merged_rotary_tables(positions, [2, 3, 3])
    got = _attend(layer, hidden, cos, sin)
    for place, row in enumerate(ROWS):
        expected = attention_of_row(layer, hidden[:LENGTH], cos[:LENGTH], sin[:LENGTH], row)
        torch.testing.assert_close(got[place, :, :LENGTH], expected)


def test_padding_is_never_read() -> None:
    layer = random_decoder(dtype=torch.float32).layer
    hidden, (cos, sin) = torch.randn(PADDED, 64), rotary_tables(torch.arange(PADDED), dtype=torch.float32)
    clean = _attend(layer, hidden, cos, sin)
    hidden[LENGTH:] = torch.inf
    assert torch.equal(_attend(layer, hidden, cos, sin), clean)


def test_half_precision_stays_near_double_precision() -> None:
    hidden, (cos, sin) = torch.randn(PADDED, 64).half(), rotary_tables(torch.arange(PADDED))
    half, double = (random_decoder(dtype=dtype).layer for dtype in (torch.float16, torch.float64))
    got = _attend(half, hidden, cos.float(), sin.float())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), _attend(double, hidden.double(), cos, sin), rtol=0.05, atol=2e-3)


def test_tensorrt_stores_query_and_key_weights_once(tmp_path: Path) -> None:
    settings = LlamaConfig(
        hidden_size=1024, intermediate_size=64, num_attention_heads=8, num_key_value_heads=8, vocab_size=8
    )
    layer = LlamaDecoderLayer(settings, 0).half().requires_grad_(False)
    weight = 2 * layer.self_attn.q_proj.weight.numel()
    inputs = (
        torch.randn(40, 1024).half(), torch.ones(40, 128), torch.zeros(40, 128),
        torch.tensor([33, 34]), torch.tensor([35], dtype=torch.int32),
    )  # fmt: skip
    names = ("hidden", "cos", "sin", "rows", "length")
    program = torch.onnx.export(
        RowAttention(layer).eval(), inputs, dynamo=True, opset_version=18, input_names=names, verbose=False
    )
    assert program is not None
    program.save(tmp_path / "rows.onnx")
    assert 2 * weight < build(tmp_path / "rows.onnx", CASES["random"]) < 3 * weight
