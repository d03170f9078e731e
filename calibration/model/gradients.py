"""The whole model's gradient at each layer's visual tokens, and how well the layer's own saliency agrees with it.

TRIO's probe takes the loss right after one layer. The reference here takes the same loss, of the same rows, after the last
layer, and all rows carry the gradient back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from trio_edge.calibration.model.sequence import advanced, logits_of, saliency

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.runtime.bundle.schedule import Schedule


class Agreement(NamedTuple):
    """Two scores of the same tokens."""

    spearman: float
    """Rank correlation."""
    overlap: float
    """Share of the best K tokens of one that are among the best K of the other."""


def whole_gradients(
    model: TorchModel, sequence: Sequence, schedule: Schedule, first: int = 0
) -> list[Tensor]:
    """Return for each layer from ``first`` on the gradient's length at each visual token that enters it, float32 [N].

    ``sequence`` enters layer ``first``, made outside of inference mode; later layers keep all of its tokens.
    """
    length, entering = sequence.prompt_length, []
    last = length - schedule.last_probe_offset
    rows_R = torch.arange(last - schedule.num_probe_rows + 1, last + 1, device=model.device)
    rows_R = rows_R.clamp(min=int(sequence.visual_rows_N.max()) + 1)
    with torch.enable_grad():
        sequence = replace(sequence, hidden_SD=sequence.hidden_SD.detach().requires_grad_())
        for layer in range(first, model.num_layers):
            entering.append(sequence.hidden_SD)
            sequence = advanced(model, sequence, range(layer, layer + 1))
        logits_RV = logits_of(model, sequence.hidden_SD[rows_R])
        loss = F.cross_entropy(logits_RV, logits_RV.argmax(-1))
        found = torch.autograd.grad(loss, entering)
    return [gradient_SD[sequence.visual_rows_N].norm(dim=-1).to(torch.float32) for gradient_SD in found]


def whole_gradient(model: TorchModel, layer: int, schedule: Schedule, sequence: Sequence) -> Tensor:
    """Return the scores of the visual tokens at ``layer``, in place of its saliency."""
    return whole_gradients(model, sequence, schedule, layer)[0]


def agreements(
    model: TorchModel, sequence: Sequence, schedule: Schedule, *, keep: float = 1 / 9
) -> list[Agreement]:
    """Return for each layer how well its saliency agrees with the whole gradient; K is the share ``keep`` of the tokens."""
    found = []
    for layer, whole_N in enumerate(whole_gradients(model, sequence, schedule)):
        with torch.no_grad():
            own_N = saliency(model, layer, schedule, sequence)
            found.append(agreement(own_N, whole_N, num_keep=max(round(keep * len(own_N)), 1)))
            sequence = advanced(model, sequence, range(layer, layer + 1))
    return found


def agreement(one_N: Tensor, other_N: Tensor, *, num_keep: int) -> Agreement:
    """Return the agreement of two scores."""
    ranks = torch.stack([scores_N.argsort().argsort().to(torch.float64) for scores_N in (one_N, other_N)])
    best = [set(scores_N.topk(num_keep).indices.tolist()) for scores_N in (one_N, other_N)]
    return Agreement(float(torch.corrcoef(ranks)[0, 1]), len(best[0] & best[1]) / num_keep)
