"""Attention within tiles, for InternViT's and SigLIP's towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

TILE_ATTENTION_NAME = "trio_edge_tiles"


def register_tile_attention() -> None:
    """Register ``attn_implementation="trio_edge_tiles"`` with transformers."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(TILE_ATTENTION_NAME, tile_attention)


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
    the model's type, which loses digits. ``query``, ``key`` and ``value`` are [B, H, R, E]; ``attention_mask`` is always
    None, as tiles have no padding; ``module`` is part of transformers' interface.
    """
    scores_BHRR = torch.matmul(query * scaling, key.transpose(-1, -2))
    weights_BHRR = torch.softmax(scores_BHRR.float(), dim=-1).to(value.dtype)
    return torch.matmul(weights_BHRR, value).transpose(1, 2), None
