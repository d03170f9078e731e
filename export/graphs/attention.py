"""The decoder: its attention, its rotary tables, and ``prefix``, ``segment_i`` and ``suffix``, ranges of its layers.

A range has the layers [first, last), for prefill and decode alike.

| I/O tensor                     | shape        | dtype | filled or read by                                          |
|--------------------------------|--------------|-------|------------------------------------------------------------|
| in  hidden_states              | [B, S, D]    | model | ``inputs_embeds`` for the prefix; output of select or range |
| in  position_ids               | [A, S]       | int32 | runtime, or the select graph's ``kept_position_ids``        |
| in  past_length                | [B]          | int32 | runtime: valid rows of the past buffers (0 in prefill)      |
| in  num_rows                   | [B]          | int32 | runtime: real rows; with linear attention only              |
| in  past_key_values.{i}.key    | [B, G, C, E] | model | runtime's KV buffers; i is the model's layer number         |
| in  past_key_values.{i}.value  | [B, G, C, E] | model |                                                            |
| in  deepstack_embeds.{i}       | [B, S, D]    | model | runtime, or a select graph; with DeepStack only             |
| out hidden_states_out          | [B, S, D]    | model | next graph                                                  |
| out present.{i}.key            | [B, G, S, E] | model | runtime: new rows only, written into the buffers            |
| out present.{i}.value          | [B, G, S, E] | model |                                                            |

A layer with linear attention has two states in place of keys and values: ``past_states.{i}.conv`` and ``.delta``, 0 in prefill,
and ``present_states.{i}.conv`` and ``.delta``, which replace them; see ``state_layers.py``. A short convolution has the first.

Prefill runs with C = 0 and padding on the right; decode with S = 1. ``export/quantize/cache.py`` makes keys and values int8.
B is 1. With --batch, and with linear attention, it is an axis: the answers that decode together, each with its own KV buffers;
``position_ids`` are [A, B, S] then. Only the attention tells the answers apart: all products with weights see the rows of all
answers at once.

With DeepStack (Qwen3-VL) features of inner vision layers are added to the outputs of the first decoder layers, one plane of
rows per layer, 0 at text and in decode. ``assembly/copies.py`` adds them between the layers.

The attention, over past and new rows in two parts, is registered with transformers under the name ``trio_edge``.

Scores against the past buffer and the new rows are joined before one softmax, so the KV cache is read in place and never
copied. It uses MatMul and Softmax only, because TensorRT 10.3 reads no other attention.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.state_layers import is_linear, num_kept

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ATTENTION_NAME = "trio_edge"
"""Attention of the decoder, over past and new rows in two parts."""
TILE_ATTENTION_NAME = "trio_edge_tiles"
"""Attention within the tiles of InternViT and SigLIP."""
MASKED = -1e30
"""Added to the score of a masked row; finite, so that a fully masked row gives no NaN."""


def register_attention() -> None:
    """Register both names with transformers, as values of ``attn_implementation``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, two_part_attention)
    ALL_ATTENTION_FUNCTIONS.register(TILE_ATTENTION_NAME, tile_attention)


def two_part_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    past: tuple[Tensor, Tensor],
    present: list[Tensor],
    as_cached: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Return attention of the new rows over past and new rows, and append the new keys and values to ``present``.

    Args:
        module: The attention layer; unused, part of transformers' interface.
        query: [1, H, B S, E], rotated; the rows of each answer follow those of the one before.
        key: [1, G, B S, E], rotated.
        value: [1, G, B S, E].
        attention_mask: [S, C + S] float32, added to the scores; with an axis of answers [B, 1, 1, S, C + S].
        scaling: Multiplied with the query before the product, which keeps float16 scores in range.
        past: Key and value buffers, [B, G, C, E] each.
        present: Receives ``key`` and ``value``, [B, G, S, E].
        as_cached: Rounds both as KV caches do; by default these round nothing.

    Returns:
        [1, B S, H, E] in the query's dtype, and None for the weights.
    """
    key, value = (key, value) if as_cached is None else as_cached(key, value)
    has_answers = attention_mask.ndim > 2
    B, G, C, E = past[0].shape
    S = attention_mask.shape[-2]
    if has_answers:
        query, key, value = (_apart(rows, B, S) for rows in (query, key, value))
    present += [key, value]
    H = query.shape[1]
    # the query heads of a group are rows of one product, so keys are not repeated
    grouped = (query * scaling).reshape(B, G, (H // G) * S, E)
    # all sizes are given: with S = 0, while a probe runs in the same graph, none can be inferred
    past_scores = torch.matmul(grouped, past[0].transpose(-1, -2)).reshape(B, G, H // G, S, C)
    new_scores = torch.matmul(grouped, key.transpose(-1, -2)).reshape(B, G, H // G, S, S)
    scores = torch.cat([past_scores, new_scores], dim=-1).float() + attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype).reshape(B, G, (H // G) * S, C + S)
    output = torch.matmul(weights[..., :C], past[1]) + torch.matmul(weights[..., C:], value)
    by_row = output.reshape(B, H, S, E).transpose(1, 2)
    return by_row.reshape(1, B * S, H, E) if has_answers else by_row, None


def _apart(rows: Tensor, num_answers: int, num_rows: int) -> Tensor:
    """Return [1, X, B S, E] as [B, X, S, E]."""
    _, X, _, E = rows.shape
    return rows.reshape(X, num_answers, num_rows, E).transpose(0, 1)


def tile_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_unused: Any,
) -> tuple[Tensor, None]:
    """Return attention within each tile, [B, R, H, E] in the query's dtype, and None for the weights.

    transformers' own attention scales after the product, which may overflow in float16, and computes InternVL's softmax in
    the model's type, which loses digits. ``query``, ``key`` and ``value`` are [B, H, R, E]; ``attention_mask``, float32, is
    added to the scores of tiles with padding; ``module`` is part of transformers' interface.
    """
    scores_BHRR = torch.matmul(query * scaling, key.transpose(-1, -2)).float()
    if attention_mask is not None:
        scores_BHRR = scores_BHRR + attention_mask
    weights_BHRR = torch.softmax(scores_BHRR, dim=-1).to(value.dtype)
    return torch.matmul(weights_BHRR, value).transpose(1, 2), None


def causal_mask(num_rows: int, num_past: int, past_length: Tensor) -> Tensor:
    """Return the additive causal mask [S, C + S], float32, of new rows over a partly filled past buffer and themselves.

    ``past_length`` is [1], or [B, 1, 1, 1, 1] for a mask of each answer, [B, 1, 1, S, C + S].
    """
    row_S = torch.arange(num_rows)
    past_C = torch.arange(num_past)
    answers = past_length.shape[:-2]
    sees_past = (past_C[None, :] < past_length.to(torch.int64)).expand(*answers, num_rows, num_past)
    sees_new = row_S[None, :] <= row_S[:, None]
    if answers:
        sees_new = sees_new.expand(*answers, num_rows, num_rows)
    seen = torch.cat([sees_past, sees_new], dim=-1)
    # not torch.where of two numbers: its result has the default dtype, in which MASKED may be infinite
    return (1.0 - seen.to(torch.float32)) * MASKED


def scale_positions(position_ids_AS: Tensor) -> Tensor:
    """Return the positions [1, S] from which Ministral 3's layers compute the scale of their queries.

    They are float32, for a quotient of integers has the default dtype, in which large positions may be infinite.
    """
    return position_ids_AS[:1].to(torch.float32)


class RotaryTables(nn.Module):
    """cos and sin tables of a decoder from position ids, computed in float32.

    The exporter fills in the constant ``inv_freq``, which has no values under FakeTensorMode.
    """

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor, *, attention_scaling: float) -> None:
        """Hold ``inv_freq``, [A, E/2] float32, and the factor on both tables.

        With M-RoPE (A = 3) each frequency belongs to one axis and is 0 at the others.
        """
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)
        self.attention_scaling = attention_scaling

    def forward(self, position_ids_AS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, S, E] float32, in Hugging Face's layout, with two equal halves of E.

        A is 1, or 3 with M-RoPE: time, row and column of each token.
        """
        angles = position_ids_AS[..., None].to(torch.float32) * self.inv_freq[:, None]
        if len(self.inv_freq) > 1:
            angles = angles.sum(dim=0, keepdim=True)  # exact: all but one are 0
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


class DecoderRange(nn.Module):
    """Consecutive Hugging Face decoder layers with a flat interface of keys and values, or states."""

    def __init__(self, layers: Sequence[nn.Module], rotary: RotaryTables) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.rotary = rotary

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, past_length: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the hidden states after the layers, then for each layer key and value of the new rows, or its states.

        ``others`` are key and value buffers, or states, of each layer; before them ``num_rows``, if there are states.
        """
        B, S, D = hidden_states.shape
        num_rows = others[0]  # without states it is not read
        past = iter(others[len(others) - sum(map(num_kept, self.layers)) :])
        if has_answers := position_ids.ndim > 2:
            hidden_states = hidden_states.reshape(1, B * S, D)
            position_ids = position_ids.reshape(position_ids.shape[0], B * S)
            past_length = past_length[:, None, None, None, None]
        cos, sin = self.rotary(position_ids)
        tables = cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)
        present: list[Tensor] = []
        for layer in self.layers:
            layer_past = tuple(itertools.islice(past, num_kept(layer)))
            if is_linear(layer):
                apart = hidden_states.reshape(B, S, D)
                hidden_states = layer(apart, num_rows=num_rows, past=layer_past, present=present)
                hidden_states = hidden_states.reshape(1, B * S, D)
                continue
            mask = causal_mask(S, layer_past[0].shape[2], past_length)
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=tables,
                position_ids=scale_positions(position_ids),
                past=layer_past,
                present=present,
            )
        return hidden_states.reshape(B, S, D) if has_answers else hidden_states, *present
