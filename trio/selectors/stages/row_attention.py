"""Attention of a few rows over all rows of one Hugging Face decoder layer, and helpers of the selectors that read it.

    h = w ⊙ x / rms(x)                          input norm
    q = RoPE(W_q h + bias) of the given rows,   k = RoPE(W_k h + bias) of all rows      with Qwen3's norm of heads before RoPE
    a = softmax(q · k / √E)                     over the real rows that a row may see, per head

Nothing else of the layer runs: no values, no output projection, no MLP, and no attention between all rows. Weights are
used in their own type; everything between the products is float32, or float64 in a float64 model. The query rows are
gathered before their product, so that TensorRT does not fuse both products into one with a second copy of both weights.

Letters: S rows, R query rows, N visual tokens (padded), D hidden size, H query heads, G key/value heads, E head size, T
text rows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trio_edge.trio.decoder_layers import (
    key_norm,
    num_heads,
    rms_norm,
    rotate,
    scaled_queries,
    sliding_window,
    split_gate,
)
from trio_edge.trio.selectors import interface


class RowAttention(nn.Module):
    """Attention probabilities of given rows in one layer; holds Hugging Face's own module."""

    layer: Any

    def __init__(self, layer: Any) -> None:
        """Hold a Llama, Mistral, Qwen2, Qwen2.5-VL or Qwen3 decoder layer (q and k may have biases)."""
        super().__init__()
        self.layer = layer

    def forward(
        self,
        hidden_SD: Float[Tensor, "S D"],
        cos_SE: Float[Tensor, "S E"],
        sin_SE: Float[Tensor, "S E"],
        rows_R: Int[Tensor, "R"],
        length: Int[Tensor, "*one"],
        position_S: Int[Tensor, "S"] | None = None,
    ) -> Float[Tensor, "R H S"]:
        """Return the attention of each row, per head.

        Args:
            hidden_SD: Hidden states that enter the layer, right-padded; padding is not read.
            cos_SE: Rotary table, already merged for M-RoPE.
            sin_SE: Likewise.
            rows_R: Query rows, in [0, S). R may be symbolic.
            length: Number of real rows, 0-d or [1].
            position_S: Positions, for a layer whose queries have a scale.

        Returns:
            Probabilities, float32 (float64 in a float64 model); 0 at rows that a query may not see.
        """
        attention: Any = self.layer.self_attn
        size = int(attention.head_dim)
        rows_R = rows_R.to(torch.int64)
        normed_SD = normed_rows(self.layer, hidden_SD, length)
        cos_SE, sin_SE = cos_SE.to(normed_SD.dtype), sin_SE.to(normed_SD.dtype)
        key_SGE = rotated_keys(self.layer, normed_SD, cos_SE, sin_SE)
        query_RHX = _projected(attention.q_proj, normed_SD.index_select(0, rows_R), num_heads(attention))
        query_RHE = rms_norm(split_gate(query_RHX, attention)[0], getattr(attention, "q_norm", None))
        tables = (table.index_select(0, rows_R)[:, None] for table in (cos_SE, sin_SE))
        query_RHE = rotate(query_RHE, *tables)
        query_RHE = scaled_queries(query_RHE, attention, position_S, rows_R)
        G, H = key_SGE.shape[1], query_RHE.shape[1]
        query_GME = query_RHE.transpose(0, 1).reshape(G, -1, size)  # M: heads of a group, then rows
        scores_GMS = torch.matmul(query_GME, key_SGE.permute(1, 2, 0)) / math.sqrt(size)
        visible_MS = self._visible(rows_R, hidden_SD.shape[0], length).repeat(H // G, 1)
        scores_GMS = torch.where(visible_MS[None], scores_GMS, torch.finfo(scores_GMS.dtype).min)
        probability_GMS = torch.softmax(scores_GMS, dim=-1)
        return probability_GMS.reshape(H, -1, hidden_SD.shape[0]).transpose(0, 1)

    def _visible(self, rows_R: Tensor, num_rows: Any, length: Tensor) -> Tensor:
        index_S = torch.arange(num_rows, device=rows_R.device)
        visible_RS = (index_S[None, :] <= rows_R[:, None]) & (index_S < length.reshape(1))[None, :]
        window = sliding_window(self.layer.self_attn)
        if window is not None:
            visible_RS = visible_RS & (index_S[None, :] > rows_R[:, None] - window)
        return visible_RS


class MostAttended(interface.KeepingModule):
    """Keeps the tokens with the most attention of the last real row in one layer; a ``StageSelector``."""

    reads_previous: ClassVar[bool]
    """Whether this is the layer before the stage, and not the one after it."""

    def __init__(self, layer: Any, *, num_keep: int, image_share: int | None = None) -> None:
        """Hold the decoder layer; raise ScheduleError if K is below 1. ``image_share`` is that of ``StageParts``."""
        super().__init__(num_keep=num_keep)
        self.attention = RowAttention(layer)
        self.image_share = image_share

    @classmethod
    def for_stage(cls, parts: interface.StageParts) -> MostAttended:
        """Return the selector of a stage."""
        layer = parts.previous_layer if cls.reads_previous else parts.layer
        return cls(layer, num_keep=parts.num_keep, image_share=parts.image_share)

    def forward(self, inputs: interface.StageInputs) -> interface.Selection:
        """Return the tokens with the most attention, mean over heads; raise ScheduleError if N < K."""
        interface.check_num_keep(self.num_keep, inputs.visual_rows_N.shape[0])
        hidden_SD = inputs.previous_SD if self.reads_previous else inputs.hidden_SD
        assert hidden_SD is not None, "reads_previous"
        last_1 = inputs.length.to(torch.int64).reshape(1) - 1
        attention_RHS = self.attention(
            hidden_SD, inputs.cos_SE, inputs.sin_SE, last_1, inputs.length, inputs.position_S
        )
        scores_N = at_visual_tokens(attention_RHS.mean(1)[0], inputs)
        kept_K = interface.best_tokens(
            scores_N,
            inputs.num_visual,
            num_keep=self.num_keep,
            image_N=inputs.image_N,
            image_share=self.image_share,
        )
        return interface.Selection(kept_K, scores_N, settled(inputs))


class TextRows(NamedTuple):
    """The text after the images, padded to T = S - N rows."""

    rows_T: Tensor
    """[T] int64, within [0, S)."""
    real_T: Tensor
    """[T] bool."""
    num_text: Tensor
    """[1] int64."""


def text_after(inputs: interface.StageInputs) -> TextRows:
    """Return the rows of the text after the last visual token of the prompt, or of this stage if there is no ``prompt``.

    The two differ if earlier stages have dropped all tokens of the last image.
    """
    num_rows = inputs.hidden_SD.shape[0]
    num_visual, length = (value.to(torch.int64).reshape(1) for value in (inputs.num_visual, inputs.length))
    if inputs.prompt is None:
        last = inputs.visual_rows_N.to(torch.int64).index_select(0, (num_visual - 1).clamp(min=0))
        num_text = length - 1 - last
    else:
        is_visual_F = inputs.prompt.is_visual_F > 0
        index_F = torch.arange(is_visual_F.shape[0], device=length.device).to(torch.float32)
        last = torch.where(is_visual_F, index_F, 0.0).amax(0, keepdim=True).to(torch.int64)
        num_text = inputs.prompt.length.to(torch.int64).reshape(1) - 1 - last
    num_text = torch.where(num_visual > 0, num_text, 0).clamp(min=0)
    index_T = torch.arange(num_rows - inputs.visual_rows_N.shape[0], device=length.device)
    return TextRows((length - num_text + index_T).clamp(0, num_rows - 1), index_T < num_text, num_text)


def visual_rows(inputs: interface.StageInputs) -> Int[Tensor, "N"]:
    """Return the visual tokens' rows as int64; those of padding are within the sequence."""
    return inputs.visual_rows_N.to(torch.int64).clamp(max=inputs.hidden_SD.shape[0] - 1)


def real_tokens(inputs: interface.StageInputs) -> Tensor:
    """Return whether each of the N visual tokens is real, bool [N]."""
    index_N = torch.arange(inputs.visual_rows_N.shape[0], device=inputs.visual_rows_N.device)
    return index_N < inputs.num_visual.reshape(1)


def at_visual_tokens(scores_S: Tensor, inputs: interface.StageInputs) -> Float[Tensor, "N"]:
    """Return the scores of the rows that are visual tokens; -1 at padding."""
    return torch.where(real_tokens(inputs), scores_S.index_select(0, visual_rows(inputs)), -1.0)


def settled(inputs: interface.StageInputs) -> Int[Tensor, "1"]:
    """Return 0, as there are no rounds; computed, because a graph's output should not be a constant."""
    return inputs.num_visual.reshape(1).to(torch.int32) * 0


def real_rows(hidden_SD: Float[Tensor, "S D"], length: Int[Tensor, "*one"]) -> Float[Tensor, "S D"]:
    """Return hidden states in at least float32, with 0 at padding."""
    index_S = torch.arange(hidden_SD.shape[0], device=hidden_SD.device)
    hidden_SD = hidden_SD.to(torch.promote_types(hidden_SD.dtype, torch.float32))
    return torch.where((index_S < length.reshape(1))[:, None], hidden_SD, 0.0)


def normed_rows(
    layer: Any, hidden_SD: Float[Tensor, "S D"], length: Int[Tensor, "*one"]
) -> Float[Tensor, "S D"]:
    """Return the input of the attention of ``layer``, in at least float32; 0 at padding."""
    return rms_norm(real_rows(hidden_SD, length), layer.input_layernorm)


def rotated_keys(
    layer: Any, normed_SD: Float[Tensor, "S D"], cos_ST: Float[Tensor, "S T"], sin_ST: Float[Tensor, "S T"]
) -> Float[Tensor, "S G E"]:
    """Return the keys of all rows, the first T of E elements rotated."""
    attention: Any = layer.self_attn
    groups = attention.k_proj.weight.shape[0] // int(attention.head_dim)
    key_SGE = _projected(attention.k_proj, normed_SD, groups)
    return rotate(rms_norm(key_SGE, key_norm(attention)), cos_ST[:, None], sin_ST[:, None])


def _projected(linear: Any, rows_RD: Tensor, heads: int) -> Tensor:
    """Return a linear layer's result, computed in its own type, split into heads and cast to the type of the rows."""
    rows: Tensor = linear(rows_RD.to(linear.weight.dtype)).to(rows_RD.dtype)
    return rows.reshape(-1, heads, linear.weight.shape[0] // heads)
