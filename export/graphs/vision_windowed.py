"""``vision`` of the Qwen2.5-VL family: patches of one picture in window order to visual tokens in raster order.

| I/O tensor          | shape    | dtype   | filled or read by                                                        |
|---------------------|----------|---------|--------------------------------------------------------------------------|
| in  pixel_values    | [P, F]   | float32 | runtime's image processing; F numbers of each patch                      |
| in  patch_positions | [2, P]   | int32   | runtime: row and column of each patch                                    |
| in  window_slots    | [W, Q]   | int32   | runtime: patch in each slot of each attention window, -1 where none is   |
| in  patch_slot      | [P]      | int32   | runtime: slot of each patch in the flattened windows                     |
| in  num_patches     | [1]      | int32   | runtime: real patches; those from there on are padding                   |
| in  token_index     | [N]      | int32   | runtime: which merged token each visual token is                         |
| out visual_tokens   | [N, D]   | model   | runtime: placed into the prefix graph's ``inputs_embeds``                |

Most blocks attend inside windows: queries, keys and values are gathered into [W, Q] and the result is gathered back, so
their cost grows with P * Q. A few attend over all P patches. All that depends on the picture is in the index inputs.
P is a multiple of the patches of a visual token.

Padding patches must be finite: their values reach no real patch, but they are multiplied by weights that are zero.

The sum of the blocks stays float32, and the MLPs' last product is taken of scaled-down numbers: trained encoders reach
beyond float16's 65504 there, in the last block and with some pictures only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionRotaryEmbedding

from trio_edge.export.graphs.attention import MASKED
from trio_edge.export.graphs.linear_groups import LinearGroup, gated_mlp_groups, projector_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

_HEADROOM = 64.0  # a power of two: scaling by it rounds nothing
INV_FREQ_NAME = "encoder.inv_freq"
"""The graph's one constant; ``inverse_frequencies`` gives its values."""


def inverse_frequencies(vision_config: Any) -> NDArray[np.float32]:
    """Return [E/4] inverse frequencies of the rotary embedding, also under FakeTensorMode."""
    with unset_fake_temporarily():
        inv_freq, _ = Qwen2_5_VLVisionRotaryEmbedding.compute_axial_rope_parameters(vision_config)
        values: NDArray[np.float32] = inv_freq.to(torch.float32).numpy()
        return values


class WindowedVision(nn.Module):
    """Encoder, merger of neighbouring patches, and the gather that puts the visual tokens in order."""

    def __init__(self, visual: nn.Module, *, inv_freq: Tensor) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen2_5_VisionTransformerPretrainedModel.
            inv_freq: [E/4] ``inverse_frequencies``; without values under FakeTensorMode.
        """
        super().__init__()
        core: Any = visual
        self.encoder = WindowedEncoder(visual, inv_freq=inv_freq)
        self.merger: nn.Module = core.merger

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_slots: Tensor,
        patch_slot: Tensor,
        num_patches: Tensor,
        token_index: Tensor,
    ) -> Tensor:
        """Return the visual tokens [N, D]."""
        hidden_PD, _ = self.encoder(pixel_values, patch_positions, window_slots, patch_slot, num_patches)
        return merged_tokens(self.merger, hidden_PD).index_select(0, token_index)


class Rows(NamedTuple):
    """What attention must know of B groups of R rows that see each other: of all windows, or of the whole picture."""

    cos_BR1E: Tensor
    sin_BR1E: Tensor
    mask_B11R: Tensor
    """Added to the scores, float32."""


class WindowedEncoder(nn.Module):
    """Patch embedding and blocks with attention inside windows or over the picture."""

    inv_freq: Tensor

    def __init__(self, visual: nn.Module, *, inv_freq: Tensor, observed_blocks: tuple[int, ...] = ()) -> None:
        """Take the parts of ``visual``.

        Args:
            visual: transformers' Qwen2_5_VisionTransformerPretrainedModel.
            inv_freq: [E/4] ``inverse_frequencies``.
            observed_blocks: Blocks with attention over the whole picture whose received attention is returned.
        """
        super().__init__()
        core: Any = visual
        self.patch_embed: nn.Module = core.patch_embed
        self.blocks: nn.ModuleList = core.blocks
        self.full_blocks = frozenset(core.fullatt_block_indexes)
        self.observed_blocks = observed_blocks
        self.register_buffer("inv_freq", inv_freq)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        window_slots: Tensor,
        patch_slot: Tensor,
        num_patches: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the patches' hidden states [P, D] and, of each observed block, the attention that they received [P].

        Both are float32.
        """
        hidden_PD = self._embedded(pixel_values).float()
        is_real_P = torch.arange(pixel_values.shape[0]) < num_patches
        picture = self._rows(patch_positions, is_real_P)
        is_used_WQ = window_slots >= 0
        patch_of_slot = torch.where(is_used_WQ, window_slots, 0).flatten()
        shape_WQ = window_slots.shape
        in_windows = torch.unflatten(patch_positions.index_select(1, patch_of_slot), 1, shape_WQ)
        windows = self._rows(in_windows, is_used_WQ)
        received = []
        block: Any
        for index, block in enumerate(self.blocks):
            qkv_P = block.attn.qkv(block.norm1(hidden_PD).to(block.attn.qkv.weight.dtype))
            if index in self.full_blocks:
                mixed_1PD, weights_1HPP = attention(block.attn, qkv_P[None], picture)
                mixed_PD = mixed_1PD[0]
                if index in self.observed_blocks:
                    received.append(received_attention(weights_1HPP[0], is_real_P))
            else:
                qkv_WQ = torch.unflatten(qkv_P.index_select(0, patch_of_slot), 0, shape_WQ)
                mixed_PD = attention(block.attn, qkv_WQ, windows)[0].flatten(0, 1).index_select(0, patch_slot)
            hidden_PD = hidden_PD + block.attn.proj(mixed_PD).float()
            hidden_PD = hidden_PD + _mlp(block.mlp, block.norm2(hidden_PD))
        return hidden_PD, received

    def _embedded(self, pixel_values: Tensor) -> Tensor:
        """Return [P, D]; a convolution whose stride is its kernel is one product."""
        embed: Any = self.patch_embed
        weight = embed.proj.weight
        return nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1))

    def _rows(self, positions: Tensor, is_real: Tensor) -> Rows:
        """Return the tables of patches at ``positions`` [2, R] or [2, B, R]."""
        row, column = positions.to(torch.float32)[..., None] * self.inv_freq
        angles = torch.cat([row, column, row, column], dim=-1).unsqueeze(-2)
        if is_real.dim() == 1:
            angles, is_real = angles[None], is_real[None]
        # not torch.where on two numbers: its result has the default dtype, where MASKED may be infinite
        mask = (1.0 - is_real.to(torch.float32)) * MASKED
        return Rows(angles.cos(), angles.sin(), mask[:, None, None])


def merged_tokens(merger: nn.Module, hidden_PD: Tensor) -> Tensor:
    """Return the visual tokens of all patches in their order, [P / patches of a token, D] in the weights' dtype."""
    parts: Any = merger
    normed_PD = parts.ln_q(hidden_PD).to(parts.mlp[0].weight.dtype)
    tokens: Tensor = parts.mlp(normed_PD.view(-1, parts.hidden_size))
    return tokens


def _mlp(mlp: Any, normed_PD: Tensor) -> Tensor:
    """Return the gated MLP's output, [P, D] float32; its last product cannot overflow in float16.

    Its numbers are scaled down in float32 too, so that the range of what enters is the same in both.
    """
    down = mlp.down_proj
    states = normed_PD.to(down.weight.dtype)
    gated: Tensor = mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states)
    product = nn.functional.linear(gated * (1 / _HEADROOM), down.weight).float() * _HEADROOM
    return torch.add(product, down.bias.float())


def attention(module: Any, qkv_BRX: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Return attention of each group of rows over itself, [B, R, D], and its float32 weights [B, H, R, R].

    Args:
        module: transformers' Qwen2_5_VLVisionAttention; only its sizes are read.
        qkv_BRX: [B, R, 3 D], queries, keys and values.
        rows: Of the same B and R.
    """
    heads, size = module.num_heads, module.head_dim
    rotated = _rotated(torch.unflatten(qkv_BRX[..., : 2 * module.dim], -1, (2 * heads, size)), rows)
    query, key = rotated[:, :, :heads], rotated[:, :, heads:]
    value = torch.unflatten(qkv_BRX[..., 2 * module.dim :], -1, (heads, size))
    # scaling the query, not the scores, keeps float16 scores in range
    scores_BHRR = torch.matmul((query * module.scaling).transpose(1, 2), key.permute(0, 2, 3, 1))
    weights_BHRR = torch.softmax(scores_BHRR.float() + rows.mask_B11R, dim=-1)
    mixed_BHRE = torch.matmul(weights_BHRR.to(value.dtype), value.transpose(1, 2))
    return mixed_BHRE.transpose(1, 2).flatten(2), weights_BHRR


def _rotated(states_BRHE: Tensor, rows: Rows) -> Tensor:
    """Return the states rotated to their positions; in float32, as Hugging Face does it."""
    states = states_BRHE.float()
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return (states * rows.cos_BR1E + turned * rows.sin_BR1E).to(states_BRHE.dtype)


def received_attention(weights_HPP: Tensor, is_real_P: Tensor) -> Tensor:
    """Return the attention that each patch receives, [P]: the sum over heads, the mean over real queries."""
    query_P = is_real_P.to(weights_HPP.dtype)
    return torch.matmul(query_P / query_P.sum(), weights_HPP.sum(dim=0))


def windowed_groups(visual: nn.Module) -> tuple[LinearGroup, ...]:
    """Return the linear layers of transformers' Qwen2_5_VisionTransformerPretrainedModel.

    Four patches with one norm each are one input of the merger, so the norm has no element for each of its inputs.
    """
    core: Any = visual
    return (
        *(group for index, block in enumerate(core.blocks) for group in _block_groups(block, index)),
        *projector_groups(core.merger.mlp[0], core.merger.mlp[2], norm=None),
    )


def _block_groups(block: Any, index: int) -> Iterator[LinearGroup]:
    qkv, values = block.attn.qkv, 2 * block.attn.dim
    yield LinearGroup(name="qkv", layer=index, linears=(qkv,), before=block.norm1)
    yield LinearGroup(name="o", layer=index, linears=(block.attn.proj,), before=qkv, start=values)
    yield from gated_mlp_groups(block.mlp, norm=block.norm2, index=index)
