"""Attention that each layer still pays to the image, in the model that keeps all visual tokens.

Three numbers for the input of every layer but the first, from the layer's own probe:

    attention share   of the probe rows' attention, mean over heads and rows, that lies on visual tokens
    saliency mass     Σ_i ‖∂loss/∂x_i‖ ‖x_i‖, in nats: bounds the first-order change of the proxy loss if all visual
                      tokens were faded out
    effective share   (Σ_i s_i)² / (N Σ_i s_i²) of the saliency s: the share of tokens that carry it; 1 if all are alike
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import torch

from trio_edge.calibration.model.selecting import saliency
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence as Many

    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.search.measure.measuring import KeepAll


class LayerImportance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Importance of the visual tokens before one layer; of one sample, or a mean of samples."""

    layer: int
    attention_share: float
    saliency_mass: float
    effective_share: float


def importance(model: TorchModel, whole: KeepAll, *, probes: Probes) -> list[LayerImportance]:
    """Return the numbers of one sample for layers 1 to the last."""
    return [_of_layer(model, whole.inputs[layer], layer, probes) for layer in range(1, model.num_layers)]


def mean_importance(samples: Many[Many[LayerImportance]]) -> list[LayerImportance]:
    """Return the mean over samples, layer by layer."""
    return [
        LayerImportance(
            layer=alike[0].layer,
            attention_share=sum(one.attention_share for one in alike) / len(alike),
            saliency_mass=sum(one.saliency_mass for one in alike) / len(alike),
            effective_share=sum(one.effective_share for one in alike) / len(alike),
        )
        for alike in zip(*samples)
    ]


def _of_layer(model: TorchModel, entering: Sequence, layer: int, probes: Probes) -> LayerImportance:
    probe = probes.of(layer, Schedule())
    length = entering.prompt_length
    cos, sin = model.rotary(entering.positions_AS[:, :length])
    visual_N = torch.arange(entering.num_visual, device=model.device) + entering.visual_start
    hidden_SD = entering.hidden_SD[:length]
    state = probe.attend(hidden_SD, cos[0], sin[0], visual_N, torch.tensor([length], device=model.device))
    scores_N = saliency(model, probe, entering)
    norms_N = hidden_SD[visual_N].to(scores_N.dtype).norm(dim=-1)
    square = float((scores_N * scores_N).sum())
    return LayerImportance(
        layer=layer,
        attention_share=float(state.attention_GMN.sum(-1).mean()),
        saliency_mass=float((scores_N * norms_N).sum()),
        effective_share=float(scores_N.sum()) ** 2 / (len(scores_N) * square) if square > 0 else 1.0,
    )
