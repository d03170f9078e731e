"""``vision``: picture tiles to visual tokens.

| I/O tensor        | shape        | dtype   | filled or read by                                                       |
|-------------------|--------------|---------|-------------------------------------------------------------------------|
| in  pixel_values  | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the base tile first                |
| in  token_index   | [N]          | int32   | runtime: which feature row each visual token is                         |
| out visual_tokens | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``               |

Feature rows are tile-major, patches in raster order, and one newline row last. All of anyres tiling, unpadding and
newline placement is in ``token_index``, so the graph has no picture-dependent shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.linear_groups import LinearGroup, mlp_groups, projector_groups

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class ClipFeatures(nn.Module):
    """Hidden states of chosen CLIP layers without the CLS row. Layers that nothing reads are not run."""

    def __init__(self, tower: nn.Module, *, feature_layers: tuple[int, ...]) -> None:
        """Take the parts of ``tower`` that are needed.

        Args:
            tower: transformers' CLIPVisionModel.
            feature_layers: Indices into its hidden states (0 is the embedding, -1 the last layer's output).
        """
        super().__init__()
        core: Any = getattr(tower, "vision_model", tower)
        num_states = len(core.encoder.layers) + 1
        self.states = tuple(range(num_states)[layer] for layer in feature_layers)
        self.embeddings: nn.Module = core.embeddings
        self.pre_layrnorm: nn.Module = core.pre_layrnorm
        self.layers = nn.ModuleList(core.encoder.layers[: max(self.states)])

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features [B, P, F] of all tiles."""
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        features = torch.cat([states[index] for index in self.states], dim=-1)
        return features[:, 1:]


class Vision(nn.Module):
    """Features, projector, newline row, and the gather that puts the visual tokens in order."""

    def __init__(self, features: ClipFeatures, projector: nn.Module, newline: nn.Parameter | None) -> None:
        super().__init__()
        self.features = features
        self.projector = projector
        self.newline = newline

    def tower_layers(self) -> nn.ModuleList:
        """The vision layers that run."""
        return self.features.layers

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        rows_FD = self.projector(self.features(pixel_values)).flatten(0, 1)
        newline_D = rows_FD[0] if self.newline is None else self.newline
        rows_FD = torch.cat([rows_FD, newline_D[None]], dim=0)
        return rows_FD.index_select(0, token_index)


def clip_groups(layers: Iterable[nn.Module], projector: nn.Module) -> tuple[LinearGroup, ...]:
    """Return the linear layers of CLIP's ``layers`` and of a LLaVA's projector, which reads hidden states without a norm."""
    parts: Any = projector
    return (
        *(group for index, layer in enumerate(layers) for group in _layer_groups(layer, index)),
        *projector_groups(parts.linear_1, parts.linear_2, norm=None),
    )


def _layer_groups(layer: Any, index: int) -> Iterator[LinearGroup]:
    attention = layer.self_attn
    products = attention.q_proj, attention.k_proj, attention.v_proj
    yield LinearGroup(name="qkv", layer=index, linears=products, before=layer.layer_norm1)
    yield LinearGroup(name="o", layer=index, linears=(attention.out_proj,), before=attention.v_proj)
    yield from mlp_groups(layer.mlp, norm=layer.layer_norm2, index=index)
