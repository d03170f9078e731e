"""``vision`` of MiniCPM-V 4.6: an overview and slices to visual tokens, by a SigLIP tower that merges patches on its way.

| I/O tensor         | shape     | dtype   | filled or read by                                                          |
|--------------------|-----------|---------|----------------------------------------------------------------------------|
| in  pixel_values   | [B, P, F] | float32 | runtime's image processing; F numbers per patch, the last ones padding     |
| in  table_index    | [B, P]    | int32   | runtime: the row of each patch in the table of positions                   |
| in  num_patches    | [B]       | int32   | runtime: real patches of each slice                                        |
| in  token_index    | [N]       | int32   | runtime: the row of each visual token in all slices                        |
| out visual_tokens  | [N, D]    | model   | runtime: placed into the prefix graph's ``inputs_embeds``                  |

Four patches that follow each other are a window of the merger inside the tower, and four of its rows are a visual token, so
both merges are reshapes. P is constant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.attention import MASKED, tile_attention
from trio_edge.export.graphs.linear_groups import (
    LinearGroup,
    attention_groups,
    projector_groups,
)
from trio_edge.export.graphs.vision.clip import encoder_groups

WINDOW = 4
"""Patches that are merged to one."""


class MiniCpmVision(nn.Module):
    """SigLIP tower with the merger after one of its layers, and the last merger."""

    def __init__(self, tower: nn.Module, merger: nn.Module, *, merge_after: int | None) -> None:
        """Take the used parts of transformers' MiniCPMV4_6VisionModel and MiniCPMV4_6Merger.

        The merger inside the tower runs after layer ``merge_after``; None leaves it out.
        """
        super().__init__()
        core: Any = tower
        mergers: Any = merger
        self.embeddings: Any = core.embeddings
        self.layers: Any = core.encoder.layers
        self.norm: nn.Module = core.post_layernorm
        self.window_merger: Any = None if merge_after is None else core.vit_merger
        self.last_merger: Any = mergers.mlp[0]
        self.merge_after = merge_after

    def forward(
        self, pixel_values: Tensor, table_index: Tensor, num_patches: Tensor, token_index: Tensor
    ) -> Tensor:
        """Return the visual tokens [N, D]."""
        patches = self.embeddings.patch_embedding
        pixels_BPF = pixel_values.to(patches.weight.dtype)
        rows_BPD = nn.functional.linear(pixels_BPF, patches.weight.flatten(1), patches.bias)
        rows_BPD = rows_BPD + self.embeddings.position_embedding(table_index)
        B, P, D = rows_BPD.shape
        num_real = num_patches[:, None]
        mask = _mask(num_real, num_rows=P)
        for index, layer in enumerate(self.layers):
            rows_BPD = rows_BPD + _attended(layer.self_attn, layer.layer_norm1(rows_BPD), mask)
            rows_BPD = rows_BPD + layer.mlp(layer.layer_norm2(rows_BPD))
            if index == self.merge_after:
                merged_XD = self._merged(rows_BPD.reshape(-1, WINDOW, D))
                rows_BPD = merged_XD.reshape(B, P // WINDOW, D)
                mask = _mask(num_real, num_rows=P // WINDOW, patches=WINDOW)
        blocks = self.norm(rows_BPD).reshape(-1, WINDOW * D)
        tokens: Tensor = self.last_merger(blocks.index_select(0, token_index))
        return tokens

    def _merged(self, windows_X4D: Tensor) -> Tensor:
        """Return one row for each window, [X, D]. Source: MiniCPMV4_6ViTWindowAttentionMerger."""
        merger = self.window_merger
        windows_X4D = windows_X4D + _attended(merger.self_attn, merger.layer_norm1(windows_X4D))
        inner = merger.act(merger.linear_1(merger.pre_norm(windows_X4D.flatten(1))))
        rows: Tensor = merger.linear_2(inner) + windows_X4D.mean(dim=1)
        return rows

    def linear_groups(self) -> tuple[LinearGroup, ...]:
        """Return the linear layers of the tower and the mergers."""
        merger, last = self.window_merger, self.last_merger
        merged: tuple[LinearGroup, ...] = ()
        if merger is not None:
            attention = attention_groups(
                merger.self_attn, merger.self_attn.out_proj, norm=merger.layer_norm1, index=0
            )
            merged = (
                *(replace(group, name=f"merger_{group.name}", layer=None) for group in attention),
                *projector_groups(merger.linear_1, merger.linear_2, norm=merger.pre_norm, name="merger"),
            )
        projector = projector_groups(last.linear_1, last.linear_2, norm=last.pre_norm)
        return (*encoder_groups(self.layers), *merged, *projector)


def _mask(num_real_B1: Tensor, *, num_rows: int, patches: int = 1) -> Tensor:
    """Return what is added to the scores of padding, [B, 1, 1, P] float32; a row stands for so many ``patches``."""
    real_BP = (torch.arange(0, num_rows * patches, patches)[None] < num_real_B1).to(torch.float32)
    # not torch.where of two numbers: its result has the default dtype, in which MASKED may be infinite
    return ((1.0 - real_BP) * MASKED)[:, None, None]


def _attended(attention: Any, rows_BRD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the output of transformers' attention module, which cuts rows by lengths that are numbers in Python."""
    sizes = attention.num_heads, attention.head_dim
    query, key, value = (
        linear(rows_BRD).unflatten(-1, sizes).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    mixed_BRHE, _ = tile_attention(attention, query, key, value, mask, scaling=attention.scaling)
    output: Tensor = attention.out_proj(mixed_BRHE.flatten(2))
    return output
