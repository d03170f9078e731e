"""The attention inside a vision tower whose tiles do not see each other: InternViT's and SigLIP's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

TILE_ATTENTION_NAME = "trio_edge_tiles"


def register_tile_attention() -> None:
    """Make ``attn_implementation="trio_edge_tiles"`` known to transformers."""
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
    """Return attention of each tile's rows over themselves, and None for the weights.

    transformers' own scales after the product, and takes the softmax of InternVL's scores in the model's type; in float16 the
    first can overflow, the second loses digits.

    Args:
        module: The attention layer; unused, part of transformers' interface.
        query: [B, H, R, E].
        key: [B, H, R, E].
        value: [B, H, R, E].
        attention_mask: Always None: tiles have no padding inside.
        scaling: Multiplied into the query.

    Returns:
        [B, R, H, E] in the query's dtype, and None for the weights.
    """
    scores_BHRR = torch.matmul(query * scaling, key.transpose(-1, -2))
    weights_BHRR = torch.softmax(scores_BHRR.float(), dim=-1).to(value.dtype)
    return torch.matmul(weights_BHRR, value).transpose(1, 2), None
