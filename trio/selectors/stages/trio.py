"""TRIO (arXiv 2602.04657): gradient saliency of a layer-local proxy loss, then feature-space NMS.

Scores are ‖∂loss/∂x_i‖₂ of the next layer with the model's own head (``saliency``). The NMS compares the hidden states
that enter that layer (``nms``). Defaults: 4 probe rows, τ = 0.8. docs/how-it-works.md lists the differences from the
paper's code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trio_edge.trio.nms import FeatureNms
from trio_edge.trio.saliency import ProxySaliency
from trio_edge.trio.selectors.interface import Selection, StageInputs, StageParts


class Trio(nn.Module):
    """TRIO's selection; a ``StageSelector``."""

    def __init__(self, saliency: ProxySaliency, nms: FeatureNms) -> None:
        super().__init__()
        self.saliency = saliency
        self.nms = nms
        self.num_keep = nms.num_keep

    @classmethod
    def for_stage(cls, parts: StageParts) -> Trio:
        """Return the selector of a stage, which probes the next layer."""
        settings = parts.settings
        saliency = ProxySaliency(
            parts.layer,
            parts.final_norm,
            parts.lm_head,
            max_visual=parts.max_visual,
            num_probe_rows=settings.num_probe_rows,
            last_probe_offset=settings.last_probe_offset,
            is_quantized=parts.is_quantized,
        )
        nms = FeatureNms(
            num_keep=parts.num_keep,
            threshold=settings.nms_threshold,
            rounds=settings.nms_rounds,
            image_share=parts.image_share,
        )
        return cls(saliency, nms)

    def forward(self, inputs: StageInputs) -> Selection:
        """Return the most salient tokens that are not similar to each other."""
        scores_N = self._scores(inputs)
        features_ND = inputs.hidden_SD.index_select(0, inputs.visual_rows_N)
        kept_K, unsettled = self.nms(features_ND, scores_N, inputs.num_visual, inputs.image_N)
        return Selection(kept_K, scores_N, unsettled)

    def _scores(self, inputs: StageInputs) -> Tensor:
        if inputs.saliency_N is not None:
            index_N = torch.arange(inputs.saliency_N.shape[0], device=inputs.saliency_N.device)
            return torch.where(index_N < inputs.num_visual, inputs.saliency_N, -1.0)
        scores_N: Tensor = self.saliency(*inputs[:6])  # up to ``length``
        return scores_N
