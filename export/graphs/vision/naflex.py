"""``vision`` of LFM2-VL: image tiles of any shape to visual tokens, by a SigLIP2 tower that reads patches (NaFlex).

| I/O tensor          | shape     | dtype   | filled or read by                                                         |
|---------------------|-----------|---------|---------------------------------------------------------------------------|
| in  pixel_values    | [B, P, F] | float32 | runtime's image processing; F numbers per patch, the last ones padding    |
| in  spatial_shapes  | [B, 2]    | int32   | runtime: rows and columns of patches of each tile                         |
| in  token_index     | [N, M]    | int32   | runtime: the patches of each visual token, in all tiles                   |
| out visual_tokens   | [N, D]    | model   | runtime: placed into the prefix graph's ``inputs_embeds``                 |

transformers resizes the table of positions to each tile's shape by products with the weights of its rows and columns, so no
shape in the graph depends on an image. P is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.attention import MASKED
from trio_edge.export.graphs.linear_groups import LinearGroup, projector_groups
from trio_edge.export.graphs.vision.clip import encoder_groups


class NaflexVision(nn.Module):
    """SigLIP2 tower, and the projector of each token's patches."""

    def __init__(self, tower: nn.Module, projector: nn.Module) -> None:
        """Take the used parts of transformers' Siglip2VisionModel and Lfm2VlMultiModalProjector."""
        super().__init__()
        core: Any = tower
        self.embeddings: Any = core.embeddings
        self.layers: nn.ModuleList = core.encoder.layers
        self.norm: nn.Module = core.post_layernorm
        self.projector: Any = projector

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor, token_index: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        embedding = self.embeddings.patch_embedding
        height_B1, width_B1 = torch.split(spatial_shapes.to(torch.float32), 1, dim=1)
        patch_BP = torch.arange(pixel_values.shape[1], dtype=torch.float32)[None]
        real_BP = (patch_BP < height_B1 * width_B1).to(torch.float32)
        # padding is at the first place, as a table has no rows beyond its sides
        patch_BP = patch_BP * real_BP
        row_BP = torch.floor(patch_BP / width_B1)
        places = (row_BP, height_B1), (patch_BP - row_BP * width_B1, width_B1)
        hidden_BPD = embedding(pixel_values.to(embedding.weight.dtype)) + self._positions(*places)
        # not torch.where of two numbers: its result has the default dtype, in which MASKED may be infinite
        mask_B11P = ((1.0 - real_BP) * MASKED)[:, None, None]
        for layer in self.layers:
            hidden_BPD = layer(hidden_BPD, mask_B11P)
        rows = self.norm(hidden_BPD).flatten(0, 1)
        joined = rows.index_select(0, token_index.flatten()).reshape(token_index.shape[0], -1)
        if self.projector.use_layer_norm:
            joined = self.projector.layer_norm(joined)
        tokens: Tensor = self.projector.linear_2(self.projector.act(self.projector.linear_1(joined)))
        return tokens

    def _positions(self, *places_BP: tuple[Tensor, Tensor]) -> Tensor:
        """Return the table of positions, resized with antialiasing, at rows and columns: [B, P, D].

        Source: resize_positional_embeddings of Siglip2VisionEmbeddings, whose checks of values cannot be exported.
        """
        table, side = self.embeddings.position_embedding.weight, self.embeddings.position_embedding_size
        source = torch.arange(side, dtype=torch.float32)
        weights = []
        for place_BP, size_B1 in places_BP:
            scale_B1 = side / size_B1
            center_BP = (place_BP + 0.5) * scale_B1 - 0.5
            distance = (source - center_BP[..., None]).abs() / scale_B1.clamp(min=1)[..., None]
            near = (1 - distance).clamp(min=0)
            weights.append(near / near.sum(-1, keepdim=True))
        rows, columns = weights
        both = (rows[..., None] * columns[..., None, :]).flatten(-2)
        return torch.matmul(both, table.float()).to(table.dtype)

    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """Return the linear layers of tower and projector."""
        embedding, projector = self.embeddings.patch_embedding, self.projector
        return (
            LinearGroup(name="patches", layer=None, linears=(embedding,), before=None),
            *encoder_groups(self.layers),
            *projector_groups(projector.linear_1, projector.linear_2, norm=projector.layer_norm),
        )
