"""``vision`` with what selectors in front of the decoder look at, of CLIP towers.

| I/O tensor          | shape  | dtype   | filled or read by                                                          |
|---------------------|--------|---------|----------------------------------------------------------------------------|
| in  pixel_values, token_index, out visual_tokens: as in ``vision.py``                                               |
| out features        | [N, F] | model   | reduce graph: the tower's features before the projector, 0 at newlines     |
| out keys            | [N, E] | model   | reduce graph: keys of the layer before the last, mean over heads           |
| out class_attention | [N]    | float32 | reduce graph: attention of the class row in that layer, mean over heads    |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.vision_reduced import cls_attention
from trio_edge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from trio_edge.export.graphs.vision import ClipFeatures


class VisionWithFeatures(nn.Module):
    """Features, projector, newline row, and the gather of all of them in the decoder's order."""

    def __init__(
        self, features: ClipFeatures, projector: nn.Module, newline: nn.Parameter | None, *, observed: int
    ) -> None:
        """Take the parts of the tower.

        Args:
            features: Of the tower.
            projector: To the decoder's width.
            newline: Of LLaVA-NeXT.
            observed: Layer whose keys and attention are given: the one before the tower's last.

        Raises:
            CheckpointError: If that layer does not run.
        """
        super().__init__()
        if not 0 <= observed < len(features.layers):
            raise CheckpointError(
                f"vision_feature_layer: expected layer {observed} of the tower to run, got {len(features.layers)}"
                " layers that do; this selection needs it, choose another --token-method"
            )
        self.features = features
        self.projector = projector
        self.newline = newline
        self.observed = observed

    def tower_layers(self) -> nn.ModuleList:
        """The vision layers that run."""
        return self.features.layers

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return visual tokens [N, D], features [N, F], keys [N, E] and class attention [N]."""
        hidden = self.features.pre_layrnorm(self.features.embeddings(pixel_values))
        states = [hidden]
        for index, layer in enumerate(self.features.layers):
            if index == self.observed:
                attention_BP = cls_attention(layer, hidden)
                keys_BPE = _mean_keys(layer, hidden)
            hidden = layer(hidden, attention_mask=None)
            states.append(hidden)
        features_BPF = torch.cat([states[index] for index in self.features.states], dim=-1)[:, 1:]
        tokens_RD = self.projector(features_BPF).flatten(0, 1)
        newline_D = tokens_RD[0] if self.newline is None else self.newline
        tokens_RD = torch.cat([tokens_RD, newline_D[None]], dim=0)
        features_N, keys_N, attention_N = (
            with_empty_row(rows.flatten(0, 1)).index_select(0, token_index)
            for rows in (features_BPF, keys_BPE, attention_BP)
        )
        return tokens_RD.index_select(0, token_index), features_N, keys_N, attention_N


def _mean_keys(layer: Any, hidden_BPD: Tensor) -> Tensor:
    """Return the attention keys of the patches, mean over heads: [B, P, E]."""
    attention = layer.self_attn
    keys = attention.k_proj(layer.layer_norm1(hidden_BPD))[:, 1:]  # the product that the layer itself has
    mean: Tensor = keys.unflatten(-1, (attention.num_heads, attention.head_dim)).mean(dim=2)
    return mean


def with_empty_row(rows: Tensor) -> Tensor:
    """Return the rows with one of zeros behind them, where the newline's index points."""
    return torch.cat([rows, torch.zeros_like(rows[:1])], dim=0)
