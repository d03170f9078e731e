"""``vision`` of the InternVL family: image tiles to visual tokens, each made of four neighbouring patches.

| I/O tensor        | shape        | dtype   | filled or read by                                                       |
|-------------------|--------------|---------|-------------------------------------------------------------------------|
| in  pixel_values  | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the thumbnail last                 |
| in  token_index   | [N]          | int32   | runtime: row of each visual token; the first rows, then padding         |
| out visual_tokens | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``               |

Rows are tile-major with tokens in raster order. Embeddings, layers, norms and projector are transformers' own modules; the
attention in the layers is ``tile_attention``, and the pixel shuffle is one reshape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from trio_edge.export.graphs.linear_groups import LinearGroup, attention_groups, mlp_groups, projector_groups

if TYPE_CHECKING:
    from collections.abc import Iterator


class TileVision(nn.Module):
    """InternViT, pixel shuffle, projector, and the gather that pads the visual tokens."""

    def __init__(self, tower: nn.Module, projector: nn.Module, *, merge: int) -> None:
        """Take the used parts of ``tower``, transformers' InternVLVisionModel.

        ``merge`` is the number of patches along one side of a visual token.
        """
        super().__init__()
        core: Any = tower
        self.embeddings: nn.Module = core.embeddings
        self.layers: nn.ModuleList = core.encoder.layer
        self.layernorm: nn.Module = core.layernorm
        self.projector = projector
        self.merge = merge

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        hidden = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden = layer(hidden)
        patches_BPF = self.layernorm(hidden)[:, 1:]
        rows: Tensor = self.projector(shuffled(patches_BPF, merge=self.merge)).flatten(0, 1)
        return rows.index_select(0, token_index)

    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """Return the linear layers of tower and projector."""
        parts: Any = self.projector
        return (
            *(group for index, layer in enumerate(self.layers) for group in _layer_groups(layer, index)),
            *projector_groups(parts.linear_1, parts.linear_2, norm=parts.layer_norm),
        )


def shuffled(patches_BPF: Tensor, *, merge: int) -> Tensor:
    """Return the concatenated features of ``merge`` x ``merge`` neighbouring patches: [B, P / merge², F * merge²]."""
    B, P, F = patches_BPF.shape
    side = round(P**0.5) // merge
    blocks = patches_BPF.reshape(B, side, merge, side, merge, F).transpose(2, 3)
    return blocks.reshape(B, side**2, merge**2 * F)


def _layer_groups(layer: Any, index: int) -> Iterator[LinearGroup]:
    attention, mlp = layer.attention, layer.mlp  # norms of queries and keys follow q and k
    yield from attention_groups(
        attention, attention.projection_layer, norm=layer.layernorm_before, index=index
    )
    yield from mlp_groups(mlp.fc1, mlp.fc2, norm=layer.layernorm_after, index=index)
