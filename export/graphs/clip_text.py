"""``clip_text``: the text tower of a CLIP model.

| I/O tensor     | shape     | dtype | filled or read by                                                  |
|----------------|-----------|-------|--------------------------------------------------------------------|
| in  clip_ids   | [M, L]    | int32 | runtime: M texts of the question, each with start and end          |
| out clip_texts | [M, L, Z] | model | the reduce graph: every token in the space shared with images      |

Attention is causal, so padding after a text's end does not change the text's tokens and needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ClipText(nn.Module):
    """Embeddings, causal layers, final norm and projection of every token."""

    def __init__(self, model: nn.Module) -> None:
        """Take the parts of ``model``, transformers' CLIPModel."""
        super().__init__()
        core: Any = model
        text = core.text_model
        self.token_embedding: nn.Embedding = text.embeddings.token_embedding
        self.position_embedding: nn.Embedding = text.embeddings.position_embedding
        self.layers: nn.ModuleList = text.encoder.layers
        self.final_layer_norm: nn.Module = text.final_layer_norm
        self.projection: nn.Module = core.text_projection

    def forward(self, clip_ids: Tensor) -> Tensor:
        """Return the projected tokens [M, L, Z]."""
        hidden_MLD = self.token_embedding(clip_ids) + self.position_embedding.weight
        place_L = torch.arange(clip_ids.shape[1])
        later_LL = place_L[None, :] > place_L[:, None]
        mask_LL = torch.where(later_LL, torch.finfo(hidden_MLD.dtype).min, 0.0).to(hidden_MLD.dtype)
        mask_11LL = mask_LL[None, None]
        for layer in self.layers:
            hidden_MLD = layer(hidden_MLD, attention_mask=mask_11LL)
        projected_MLZ: Tensor = self.projection(self.final_layer_norm(hidden_MLD))
        return projected_MLZ
