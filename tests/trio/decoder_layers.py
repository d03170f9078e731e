"""Small random decoder layers of each family, with the norm and head after them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.lfm2.modeling_lfm2 import Lfm2DecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.ministral3.modeling_ministral3 import Ministral3DecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

from trio_edge.trio.decoder_layers import name_as_llama

_FAMILIES = {
    "llama": (hf.LlamaConfig, LlamaDecoderLayer),
    "mistral": (hf.MistralConfig, MistralDecoderLayer),
    "ministral3": (hf.Ministral3Config, Ministral3DecoderLayer),
    "qwen2": (hf.Qwen2Config, Qwen2DecoderLayer),
    "qwen3": (hf.Qwen3Config, Qwen3DecoderLayer),
    "qwen3_5": (hf.Qwen3_5TextConfig, Qwen3_5DecoderLayer),
    "lfm2": (hf.Lfm2Config, Lfm2DecoderLayer),
}
HIDDEN, HEADS, HEAD_SIZE, VOCAB = 64, 4, 16, 97
SCALED = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": 9,
        "llama_4_scaling_beta": 0.7,
    }
}  # fmt: skip
"""Settings of a Ministral 3 decoder with scales that differ much within a few rows."""


@dataclass
class Decoder:
    """One layer, and the norm and head after it."""

    layer: Any
    final_norm: Any
    lm_head: Any


def random_decoder(
    family: str = "llama", *, num_kv_heads: int = HEADS, dtype: torch.dtype = torch.float64, **config: Any
) -> Decoder:
    torch.manual_seed(7)
    config_class, layer_class = _FAMILIES[family]
    settings = config_class(
        hidden_size=HIDDEN,
        intermediate_size=112,
        num_attention_heads=HEADS,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=1,
        vocab_size=VOCAB,
        head_dim=HEAD_SIZE,
        **config,
    )
    norm = Qwen3_5RMSNorm if family == "qwen3_5" else LlamaRMSNorm
    decoder = Decoder(layer_class(settings, 0), norm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False))
    name_as_llama(decoder.layer)
    with torch.no_grad():
        for module in (decoder.layer, decoder.final_norm, decoder.lm_head):
            for name, parameter in module.named_parameters():
                if "norm" in name or (parameter.shape == (HIDDEN,) and module is decoder.final_norm):
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.2)
            module.requires_grad_(False)
            if dtype != torch.float32:  # fake parameters cannot be converted
                module.to(dtype)
    return decoder


def rotary_tables(
    positions: Tensor, *, dtype: torch.dtype = torch.float64, size: int = HEAD_SIZE
) -> tuple[Tensor, Tensor]:
    """Return cos and sin [S, E] for positions [S]; E is ``size``."""
    frequency = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = positions.double()[:, None] * frequency
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def merged_rotary_tables(positions: Tensor, sections: list[int]) -> tuple[Tensor, Tensor]:
    """Return M-RoPE's tables from positions [3, S]: each section of the channels follows one of the three axes."""
    tables = []
    for axis_tables in zip(*(rotary_tables(axis) for axis in positions)):
        chunks = [table.split(sections * 2, -1) for table in axis_tables]
        tables.append(torch.cat([chunks[index % 3][index] for index in range(2 * len(sections))], -1))
    return tables[0], tables[1]
