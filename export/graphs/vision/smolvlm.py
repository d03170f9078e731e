"""``vision`` of SmolVLM2: image tiles to visual tokens, by a SigLIP tower with pixel shuffle.

| I/O tensor        | shape        | dtype   | filled or read by                                                     |
|-------------------|--------------|---------|-----------------------------------------------------------------------|
| in  pixel_values  | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the whole image's tile last      |
| in  token_index   | [N]          | int32   | runtime: row of each visual token; the first rows, then padding       |
| out visual_tokens | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``             |

Rows are tile-major with tokens in raster order. Every tile is full, so the positions of its patches are constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers.modeling_utils import local_torch_dtype

from trio_edge.export.graphs.linear_groups import LinearGroup
from trio_edge.export.graphs.vision.clip import encoder_groups
from trio_edge.export.graphs.vision.internvl import shuffled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class SmolVlmVision(nn.Module):
    """SigLIP tower, pixel shuffle, projection, and the gather that pads the visual tokens."""

    position_ids: Tensor
    """[P] int64."""

    def __init__(self, tower: nn.Module, connector: nn.Module, *, position_ids: Tensor) -> None:
        """Take the used parts of transformers' SmolVLMVisionTransformer and SmolVLMConnector.

        ``position_ids`` [P] has the position of each patch, from ``patch_positions``.
        """
        super().__init__()
        core: Any = tower
        joining: Any = connector
        self.patch_embedding: nn.Module = core.embeddings.patch_embedding
        self.position_embedding: nn.Module = core.embeddings.position_embedding
        self.layers: nn.ModuleList = core.encoder.layers
        self.norm: nn.Module = core.post_layernorm
        self.projection: nn.Module = joining.modality_projection.proj
        self.merge: int = joining.scale_factor
        self.register_buffer("position_ids", position_ids, persistent=False)

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        pixels = pixel_values.to(self.patch_embedding.get_parameter("weight").dtype)
        hidden = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = hidden + self.position_embedding(self.position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
        rows: Tensor = self.projection(shuffled(self.norm(hidden), merge=self.merge)).flatten(0, 1)
        return rows.index_select(0, token_index)

    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """Return the linear layers of tower and connector; the connector's input is wider than the norm before it."""
        projection = LinearGroup(name="projector_1", layer=None, linears=(self.projection,), before=None)
        return (*encoder_groups(self.layers), projection)


def patch_positions(patches_per_side: int) -> NDArray[np.int64]:
    """Return the row of the position table for each patch of a full tile: [P].

    They are 0, 1, 2, … for most sizes. transformers compares fractions, and rounding shifts some rows, for example in tiles
    with 25 patches per side. So transformers' own module is run, with a table of row numbers.
    """
    from transformers import SmolVLMVisionConfig
    from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings

    side = patches_per_side
    config = SmolVLMVisionConfig(
        hidden_size=1, num_attention_heads=1, num_channels=1, image_size=side, patch_size=1
    )
    # float32, as when transformers' model runs, whatever type is exported
    with unset_fake_temporarily(), local_torch_dtype(torch.float32), torch.no_grad():
        embeddings: Any = SmolVLMVisionEmbeddings(config)
        embeddings.position_embedding.weight[:, 0] = torch.arange(side**2)
        embeddings.patch_embedding.bias.zero_()
        pixels, is_patch = torch.zeros(1, 1, side, side), torch.ones(1, side, side, dtype=torch.bool)
        rows: NDArray[np.float32] = embeddings(pixels, is_patch).flatten().numpy()
    return rows.astype("int64")
