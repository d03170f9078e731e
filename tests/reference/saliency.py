"""Saliency by autograd over the whole layer, norm and head: slow, obvious, in the type of its inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale


def autograd_saliency(
    layer: Any, final_norm: Any, lm_head: Any, hidden: Tensor, cos: Tensor, sin: Tensor, probe_rows: list[int],
    *, around_mlp: bool = False,
) -> Tensor:  # fmt: skip
    """Return ‖∂loss/∂x_i‖ of every row; loss is the probe rows' mean cross-entropy against their own argmax.

    With ``around_mlp`` the MLP's output counts as a constant.
    """
    hidden = hidden.detach().clone().requires_grad_(True)
    output = decoder_layer(layer, hidden, cos, sin, around_mlp=around_mlp)
    logits = lm_head(rms_norm(output, final_norm))[probe_rows]
    loss = F.cross_entropy(logits, logits.argmax(-1))
    (gradient,) = torch.autograd.grad(loss, hidden)
    return gradient.norm(dim=-1)


def decoder_layer(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, *, around_mlp: bool = False
) -> Tensor:
    """Return the layer's output [S, D], without the float32 casts inside Hugging Face's norms."""
    attention, size = layer.self_attn, layer.self_attn.head_dim
    normed = rms_norm(hidden, layer.input_layernorm)
    projected, gate = attention.q_proj(normed), None
    if projected.shape[-1] > attention.o_proj.in_features:  # Qwen3.5: queries and gate of each head
        projected, gate = projected.unflatten(-1, (-1, 2, size)).unbind(-2)
        projected, gate = projected.flatten(1), gate.flatten(1)
    query, key, value = (
        rows.unflatten(-1, (-1, size)).transpose(0, 1)
        for rows in (projected, attention.k_proj(normed), attention.v_proj(normed))
    )
    if hasattr(attention, "k_norm"):
        query, key = rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)
    groups = query.shape[0] // key.shape[0]
    query, key = rotate(query, cos, sin), rotate(key, cos, sin).repeat_interleave(groups, 0)
    rope = getattr(attention.config, "rope_parameters", None) or {}
    if beta := rope.get("llama_4_scaling_beta"):  # positions are 0, 1, 2, …
        scale = get_llama_4_attn_scale(
            torch.arange(len(hidden))[None], beta, rope["original_max_position_embeddings"]
        )
        query = query * scale[0].to(query.dtype)
    scores = query @ key.transpose(1, 2) / size**0.5
    distance = torch.arange(len(hidden))[:, None] - torch.arange(len(hidden))[None, :]
    window = getattr(attention.config, "sliding_window", None) or len(hidden)
    scores = scores.masked_fill((distance < 0) | (distance >= window), float("-inf"))
    mixed = scores.softmax(-1) @ value.repeat_interleave(groups, 0)
    heads = mixed.transpose(0, 1).flatten(1)
    hidden = hidden + attention.o_proj(heads if gate is None else heads * gate.sigmoid())
    added = layer.mlp(rms_norm(hidden, layer.post_attention_layernorm))
    return hidden + (added.detach() if around_mlp else added)


def rms_norm(rows: Tensor, norm: Any) -> Tensor:
    is_qwen3_5 = type(norm).__name__ == "Qwen3_5RMSNorm"
    weight, epsilon = (1 + norm.weight, norm.eps) if is_qwen3_5 else (norm.weight, norm.variance_epsilon)
    return weight * rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + epsilon)


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows, rest = rows[..., : cos.shape[-1]], rows[..., cos.shape[-1] :]
    first, second = rows.chunk(2, -1)
    return torch.cat([rows * cos + torch.cat([-second, first], -1) * sin, rest], -1)
