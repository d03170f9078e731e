"""Attention over the patches of one image, shared by the encoders of Qwen2.5-VL, Qwen3-VL and Pixtral.

The scores of all heads would take most of the memory, so heads are computed in blocks. The residual stream is float32, and
the MLPs' last product has scaled-down inputs: in trained encoders it exceeds float16's 65504, in the last layer and for
some images.

Letters: P patches, B groups of R rows that see each other, H heads of E numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from trio_edge.export.graphs.attention import MASKED

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

_HEADROOM = 64.0  # a power of two: scaling by it rounds nothing


class Rows(NamedTuple):
    """Tables for attention within B groups of R rows: all windows, or the whole image."""

    cos_BR1E: Tensor
    sin_BR1E: Tensor
    mask_B11R: Tensor
    """Added to the scores, float32."""


def inverse_frequencies(visual: nn.Module) -> NDArray[np.float32]:
    """Return the inverse frequencies of a Qwen vision encoder's rotary embedding, [E/4], also under FakeTensorMode."""
    core: Any = visual
    with unset_fake_temporarily():
        inv_freq, _ = type(core.rotary_pos_emb).compute_axial_rope_parameters(core.config)
        values: NDArray[np.float32] = inv_freq.to(torch.float32).numpy()
        return values


def rows_at(inv_freq: Tensor, positions: Tensor, is_real: Tensor) -> Rows:
    """Return the tables of patches at ``positions``, row and column, [2, R] or [2, B, R].

    ``inv_freq`` is [E/4], or [2, 1, E/4] for rows and columns of their own; ``is_real`` [R] or [B, R] is False at padding.
    """
    row, column = positions.to(torch.float32)[..., None] * inv_freq
    angles = torch.cat([row, column, row, column], dim=-1).unsqueeze(-2)
    if is_real.dim() == 1:
        angles, is_real = angles[None], is_real[None]
    # not torch.where of two numbers: its result has the default dtype, in which MASKED may be infinite
    mask = (1.0 - is_real.to(torch.float32)) * MASKED
    return Rows(angles.cos(), angles.sin(), mask[:, None, None])


def embedded(patch_embed: Any, pixel_values: Tensor) -> Tensor:
    """Return the patches' embeddings, [P, D]; the convolution's stride is its kernel size, so it is one product."""
    weight, bias = patch_embed.proj.weight, patch_embed.proj.bias
    return nn.functional.linear(pixel_values.to(weight.dtype), weight.flatten(1), bias)


def with_headroom(linear: Any, states: Tensor) -> Tensor:
    """Return ``linear`` of ``states`` in float32, with inputs scaled down so that the product fits float16.

    A float32 model scales, too, so that inputs have the same range in both types.
    """
    product = nn.functional.linear(states * (1 / _HEADROOM), linear.weight).float() * _HEADROOM
    return product if linear.bias is None else torch.add(product, linear.bias.float())


def attention(module: Any, qkv_BRX: Tensor, rows: Rows, *, head_blocks: int = 1) -> Tensor:
    """Return attention within each group of rows, [B, R, D].

    Args:
        module: transformers' attention module, for its sizes.
        qkv_BRX: [B, R, 3 D], queries, keys and values.
        rows: Tables for the same B and R.
        head_blocks: Number of equal blocks of heads, computed one after the other.
    """
    mixed = [mixed_BhRE for _, mixed_BhRE in _head_blocks(module, qkv_BRX, rows, head_blocks)]
    mixed_BHRE = mixed[0] if head_blocks == 1 else torch.cat(mixed, dim=1)
    return mixed_BHRE.transpose(1, 2).flatten(2)


def observed_attention(
    module: Any, qkv_PX: Tensor, whole: Rows, is_real_P: Tensor, *, head_blocks: int
) -> tuple[Tensor, Tensor]:
    """Return attention over the whole image, [P, D], and the attention that each patch receives, [P] float32.

    The latter is summed over heads and averaged over real queries.
    """
    query_P = is_real_P.to(torch.float32)
    mean_11P = (query_P / query_P.sum())[None, None]
    blocks = []
    for weights_1hPP, mixed_1hPE in _head_blocks(module, qkv_PX[None], whole, head_blocks):
        received_P1 = torch.matmul(mean_11P, weights_1hPP[0]).sum(dim=0).transpose(0, 1)
        # One tensor for both: otherwise a runtime may compute the received attention last and keep all weights alive.
        blocks.append(torch.cat([mixed_1hPE[0].transpose(0, 1).flatten(1).float(), received_P1], dim=1))
    both = torch.stack(blocks, dim=1)
    return both[..., :-1].flatten(1).to(qkv_PX.dtype), both[..., -1].sum(dim=1)


def _head_blocks(
    module: Any, qkv_BRX: Tensor, rows: Rows, head_blocks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield float32 weights [B, h, R, R] and mixed values [B, h, R, E] of blocks of h heads."""
    heads, size = module.num_heads, module.head_dim
    by_head = qkv_BRX.reshape(*qkv_BRX.shape[:2], 3 * heads, size)
    rotated = _rotated(by_head[:, :, : 2 * heads], rows)
    # scaling the query, not the scores, keeps float16 scores in range
    query, key = rotated[:, :, :heads] * module.scaling, rotated[:, :, heads:]
    value = by_head[:, :, 2 * heads :]
    step = heads // head_blocks
    for start in range(0, heads, step):
        query_BRhE, key_BRhE, value_BRhE = (
            states[:, :, start : start + step] for states in (query, key, value)
        )
        scores_BhRR = torch.matmul(query_BRhE.transpose(1, 2), key_BRhE.permute(0, 2, 3, 1))
        weights_BhRR = torch.softmax(scores_BhRR.float() + rows.mask_B11R, dim=-1)
        yield weights_BhRR, torch.matmul(weights_BhRR.to(value.dtype), value_BRhE.transpose(1, 2))


def _rotated(states_BRHE: Tensor, rows: Rows) -> Tensor:
    """Return the states rotated to their positions, computed in float32 as in Hugging Face."""
    states = states_BRHE.float()
    half = states.shape[-1] // 2
    turned = torch.cat([-states[..., half:], states[..., :half]], dim=-1)
    return (states * rows.cos_BR1E + turned * rows.sin_BR1E).to(states_BRHE.dtype)
