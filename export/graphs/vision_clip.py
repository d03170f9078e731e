"""``vision`` with each visual token's patch in CLIP's space, for selections that compare patches with a text there.

| I/O tensor        | shape  | dtype | filled or read by                                                            |
|-------------------|--------|-------|------------------------------------------------------------------------------|
| in  pixel_values, token_index, out visual_tokens: as in ``vision.py``                                               |
| out clip_patches  | [N, Z] | model | reduce graph: last norm and projection of the tower's features, 0 at newlines |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.vision_features import with_empty_row

if TYPE_CHECKING:
    from trio_edge.export.graphs.vision import Vision


class VisionWithPatches(nn.Module):
    """A vision graph, and CLIP's own way on from the same features."""

    def __init__(self, vision: Vision, *, norm: nn.Module, projection: nn.Module) -> None:
        """Take the parts of ``vision``; ``norm`` and ``projection`` are CLIP's behind its tower."""
        super().__init__()
        self.features = vision.features
        self.projector = vision.projector
        self.newline = vision.newline
        self.norm = norm
        self.projection = projection

    def forward(self, pixel_values: Tensor, token_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the visual tokens [N, D] and their patches [N, Z]."""
        features_BPF = self.features(pixel_values)
        tokens_RD = self.projector(features_BPF).flatten(0, 1)
        newline_D = tokens_RD[0] if self.newline is None else self.newline
        tokens_RD = torch.cat([tokens_RD, newline_D[None]], dim=0)
        patches_RZ = with_empty_row(self.projection(self.norm(features_BPF)).flatten(0, 1))
        return tokens_RD.index_select(0, token_index), patches_RZ.index_select(0, token_index)
