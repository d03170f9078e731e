"""``vision`` of LLaVA-OneVision: image tiles to visual tokens, by a SigLIP tower.

| I/O tensor        | shape        | dtype   | filled or read by                                                |
|-------------------|--------------|---------|------------------------------------------------------------------|
| in  pixel_values  | [B, 3, T, T] | float32 | runtime's image processing; B tiles, the base tile first         |
| in  token_index   | [N, 4]       | int32   | runtime: four feature rows of each visual token                  |
| in  token_weights | [N, 4]       | float32 | runtime: their weights                                           |
| out visual_tokens | [N, D]       | model   | runtime: placed into the prefix graph's ``inputs_embeds``        |

Feature rows are as in LLaVA-NeXT: tile-major with patches in raster order, and one newline row last. The bilinear reduction
of large grids is a weighted sum of four rows; other tokens have the weight 1 for their first row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trio_edge.export.graphs.vision.clip import with_newline


class SiglipVision(nn.Module):
    """SigLIP tower, projector, newline row, and the weighted sums. Unused layers do not run."""

    def __init__(
        self,
        tower: nn.Module,
        projector: nn.Module,
        newline: nn.Parameter,
        *,
        feature_layers: tuple[int, ...],
    ) -> None:
        """Take the used parts of ``tower``, transformers' SiglipVisionModel.

        ``feature_layers`` are indices into its hidden states (0 is the embedding, -1 the last layer's output).
        """
        super().__init__()
        core: Any = getattr(tower, "vision_model", tower)  # older releases wrap it once more
        self.states = tuple(range(len(core.encoder.layers) + 1)[layer] for layer in feature_layers)
        self.embeddings: nn.Module = core.embeddings
        self.layers = nn.ModuleList(core.encoder.layers[: max(self.states)])
        self.projector = projector
        self.newline = newline

    def forward(self, pixel_values: Tensor, token_index: Tensor, token_weights: Tensor) -> Tensor:
        """Return the visual tokens [N, D]."""
        states = [self.embeddings(pixel_values)]
        for layer in self.layers:
            states.append(layer(states[-1], attention_mask=None))
        features_BPF = torch.cat([states[index] for index in self.states], dim=-1)
        rows_RD = with_newline(self.projector(features_BPF).flatten(0, 1), self.newline)
        return weighted_rows(rows_RD, token_index, token_weights)


def weighted_rows(rows_RD: Tensor, index_N4: Tensor, weights_N4: Tensor) -> Tensor:
    """Return weighted sums of four rows, in float32 as torch's interpolation: [N, D] in the rows' dtype."""
    # four gathers of N rows one after the other: a single one needs four times the memory
    first, *others = (
        rows_RD.index_select(0, index_N4[:, corner]).float() * weights_N4[:, corner : corner + 1]
        for corner in range(4)
    )
    return sum(others, start=first).to(rows_RD.dtype)
