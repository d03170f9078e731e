"""Layers with states of fixed size in place of keys and values: LFM2's short convolution, and Qwen3.5's GatedDeltaNet.

A short convolution keeps the last rows that entered it. GatedDeltaNet also has a state of the delta rule.

For each value head, with unit keys k and queries q, log decay g <= 0 and learning rate β of each row:

    S_t = e^{g_t} S_{t-1} + k_t ⊗ β_t (v_t − (e^{g_t} S_{t-1})ᵀ k_t)        o_t = S_tᵀ q_t

Rows are computed in chunks of up to 64, as in "Gated Delta Networks" (arXiv 2412.06464): within a chunk as products of matrices,
from chunk to chunk by ONNX's Scan. A decode step is a chunk of one row. The triangular matrix of a chunk is inverted block by
block, each level from the one before, without a loop over rows. A sum of its powers would be shorter, but where keys are alike,
as in an image of one colour, its terms grow like binomial numbers and cancel.

Padding rows have β = 0 and g = 0, so they leave the state as it is. States are float32, as in transformers.

Letters: A answers of a batch, S rows, C rows of a chunk, W channels of the convolution, H value heads, K key size, V value size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK_ROWS = 64
_LEVELS = 6
"""Levels of blocks in a chunk's triangular matrix: 2^6 = 64."""
_NEVER = -1e30
"""Log decay between a row and a later one; finite, as differences of it must be."""


def is_linear(layer: nn.Module) -> bool:
    """Return whether a decoder layer has states in place of keys and values."""
    return hasattr(layer, "linear_attn") or hasattr(layer, "conv")


def num_kept(layer: nn.Module) -> int:
    """Return the tensors that a layer keeps of earlier rows: keys and values, or its states."""
    return 1 if hasattr(layer, "conv") else 2


def state_layer(
    layer: Any, hidden_ASD: Tensor, *, num_rows: Tensor, past: tuple[Tensor, ...], present: list[Tensor]
) -> Tensor:
    """Return the output of a decoder layer with states, and append its new ones to ``present``.

    It takes the place of the layer's own ``forward``.

    Args:
        layer: transformers' Qwen3_5DecoderLayer, or Lfm2DecoderLayer with ``name_as_llama``.
        hidden_ASD: What enters it; rows from ``num_rows`` on are padding.
        num_rows: [A], real rows of each answer.
        past: Its states before the first row; see ``gated_delta_net`` and ``short_convolution``.
        present: Receives the states after the last real row, with the shapes of ``past``.
    """
    mix: Any = short_convolution if hasattr(layer, "conv") else gated_delta_net
    module = layer.conv if hasattr(layer, "conv") else layer.linear_attn
    mixed_ASD, *states = mix(module, layer.input_layernorm(hidden_ASD), num_rows, past)
    present += states
    hidden_ASD = hidden_ASD + mixed_ASD
    output_ASD: Tensor = hidden_ASD + layer.mlp(layer.post_attention_layernorm(hidden_ASD))
    return output_ASD


def short_convolution(
    module: Any, hidden_ASD: Tensor, num_rows_A: Tensor, past: tuple[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the output [A, S, D] of a Lfm2ShortConv, and the last real rows [A, 1, kernel - 1, D] that entered it."""
    before_ASD, after_ASD, rows_ASD = module.in_proj(hidden_ASD).chunk(3, dim=-1)
    mixed_ASD, conv = _convolution(module.conv, before_ASD * rows_ASD, num_rows_A, past[0])
    return module.out_proj(after_ASD * mixed_ASD), conv


def gated_delta_net(
    module: Any, hidden_ASD: Tensor, num_rows_A: Tensor, past: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output [A, S, D] of a Qwen3_5GatedDeltaNet, and its states after the last real row.

    ``past`` are the last rows that entered the convolution [A, 1, kernel - 1, W] in the model's type, and the state
    [A, H, K, V] float32.
    """
    A, S, _ = hidden_ASD.shape
    is_real_AS = torch.arange(S)[None, :] < num_rows_A.to(torch.int64)[:, None]
    mixed_ASW, conv = _convolution(module.conv1d, module.in_proj_qkv(hidden_ASD), num_rows_A, past[0])
    # all sizes are given: with S = 0, while a probe runs in the same graph, none can be inferred
    H, V, keys = module.num_v_heads, module.head_v_dim, (module.num_k_heads, module.head_k_dim)
    widths = [module.key_dim, module.key_dim, module.value_dim]
    query, key, value = (
        rows.reshape(A, S, *sizes).float()
        for rows, sizes in zip(torch.split(F.silu(mixed_ASW), widths, dim=-1), (keys, keys, (H, V)))
    )
    repeats = H // module.num_k_heads
    query, key = (_by_head(_unit(rows), repeats=repeats) for rows in (query, key))
    beta_ASH = torch.sigmoid(module.in_proj_b(hidden_ASD).float())
    rate_H = -module.A_log.float().exp()
    decay_ASH = rate_H * F.softplus(module.in_proj_a(hidden_ASD).float() + module.dt_bias.float())
    beta, decay = (
        _by_head(torch.where(is_real_AS[..., None], rows, 0.0)[..., None]) for rows in (beta_ASH, decay_ASH)
    )
    state_XKV = past[1].reshape(A * H, *past[1].shape[2:])
    query = query * module.head_k_dim**-0.5
    output_XSV, state_XKV = delta_rule(query, key, _by_head(value), decay, beta, state_XKV)
    output_ASHV = output_XSV.reshape(A, H, S, V).transpose(1, 2).to(hidden_ASD.dtype)
    normed_ASHV = module.norm(output_ASHV, module.in_proj_z(hidden_ASD).reshape(A, S, H, V))
    return module.out_proj(normed_ASHV.reshape(A, S, H * V)), conv, state_XKV.reshape(past[1].shape)


def _convolution(
    conv: nn.Conv1d, rows_ASW: Tensor, num_rows_A: Tensor, past: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rows after the causal convolution of each channel, and the last real rows before it."""
    A, S, W = rows_ASW.shape
    before = conv.kernel_size[0] - 1
    joined = torch.cat([past.reshape(A, before, W), rows_ASW], dim=1)
    weight = conv.weight[:, 0]
    result = joined[:, before:] * weight[:, before]
    for tap in range(before):
        result = result + joined[:, tap : tap + S] * weight[:, tap]
    last = num_rows_A.to(torch.int64)[:, None] + torch.arange(before)
    rows = (torch.arange(A)[:, None] * (before + S) + last).reshape(-1)
    kept = joined.reshape(A * (before + S), W).index_select(0, rows)
    return result, kept.reshape(A, 1, before, W)


def _unit(rows: Tensor) -> Tensor:
    return rows * torch.rsqrt((rows * rows).sum(-1, keepdim=True) + 1e-6)


def _by_head(rows: Tensor, *, repeats: int = 1) -> Tensor:
    """[A, S, H, …] -> [A H, S, …]; each head ``repeats`` times in a row."""
    A, S, H, E = rows.shape
    by_head = rows.transpose(1, 2)
    if repeats > 1:
        by_head = by_head[:, :, None].expand(A, H, repeats, S, E)
    return by_head.reshape(A * H * repeats, S, E)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs [X, S, V] of the gated delta rule, and the states after the last row.

    Args:
        query: [X, S, K] float32 for X pairs of answer and head.
        key: [X, S, K], of length 1.
        value: [X, S, V].
        decay: [X, S, 1], logarithms <= 0.
        beta: [X, S, 1], in 0..1.
        state: [X, K, V], before the first row.
    """
    X, S, _ = query.shape
    # Equal chunks. Nothing is divided by 0 at S = 0, while a probe runs in the same graph: there is one chunk without rows.
    count = S // CHUNK_ROWS + 1
    chunk = (S + count - 1) // count

    def chunks(rows: Tensor) -> Tensor:
        padded = torch.cat([rows, rows.new_zeros(X, count * chunk - S, rows.shape[-1])], dim=1)
        return padded.reshape(X, count, chunk, rows.shape[-1]).transpose(0, 1)

    query, key, value, decay, beta = map(chunks, (query, key, value, decay, beta))
    row = torch.arange(CHUNK_ROWS)
    is_before = (row[:, None] > row[None, :])[:chunk, :chunk]
    is_seen = (row[:, None] >= row[None, :])[:chunk, :chunk]
    total = decay.cumsum(-2)
    between = torch.where(is_seen, total - total.transpose(-1, -2), _NEVER).exp()
    seen_key = key.transpose(-1, -2)
    system = torch.where(is_before, torch.matmul(key * beta, seen_key) * between, 0.0)
    inverse = _inverse(system, _block_masks()[:, :chunk, :chunk].unbind(0))
    new_value = torch.matmul(inverse, value * beta)
    read_key = torch.matmul(inverse, key * beta * total.exp())
    within = torch.matmul(query, seen_key) * between
    # the last row's, 0 without rows
    last = torch.cat([total.new_zeros(count, X, 1, 1), total], dim=-2).amin(-2, keepdim=True)
    written_key = (key * (last - total).exp()).transpose(-1, -2)
    state, output = scan(
        _next_chunk, state, [new_value, read_key, within, query * total.exp(), written_key, last.exp()]
    )
    return output.transpose(0, 1).reshape(X, count * chunk, value.shape[-1])[:, :S], state


def _next_chunk(state: Tensor, chunk: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the state after a chunk, and the chunk's outputs."""
    new_value, read_key, within, query, written_key, decay = chunk
    value = new_value - torch.matmul(read_key, state)
    output = torch.matmul(query, state) + torch.matmul(within, value)
    return state * decay + torch.matmul(written_key, value), output


def _block_masks() -> Tensor:
    """Return where each level joins two blocks [levels, C, C]: below the diagonal, between neighbours of one size."""
    row = torch.arange(CHUNK_ROWS)
    blocks = [row // 2**level for level in range(_LEVELS)]
    return torch.stack(
        [(block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1) for block in blocks]
    )


def _inverse(system: Tensor, masks: Sequence[Tensor]) -> Tensor:
    """Return (1 + ``system``)⁻¹ for strictly lower triangular matrices [..., C, C].

    [[P, 0], [R, Q]]⁻¹ = [[P⁻¹, 0], [−Q⁻¹ R P⁻¹, Q⁻¹]], from blocks of one row up to the whole matrix.
    """
    chunk = system.shape[-1]
    row = torch.arange(CHUNK_ROWS)
    inverse = (row[:, None] == row[None, :])[:chunk, :chunk].to(system.dtype)
    for mask in masks:
        joined = torch.where(mask, system, 0.0)
        inverse = inverse - torch.matmul(inverse, torch.matmul(joined, inverse))
    return inverse
