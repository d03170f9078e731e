"""One selection stage as in the paper's code: autograd over one layer and the whole head, then a greedy loop on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def autograd_scores(logits_of: Callable[[Tensor], Tensor], hidden_SD: Tensor) -> Tensor:
    """Return ‖∂loss/∂x_i‖ of all rows, float32 [S].

    Args:
        logits_of: The next layer, the final norm and the head: [S, D] to logits [S, V] of all rows.
        hidden_SD: Input of that layer.
    """
    with torch.enable_grad():
        hidden = hidden_SD.clone().requires_grad_(True)
        probe = logits_of(hidden)[-5:-1].float()
        (gradient,) = torch.autograd.grad(F.cross_entropy(probe, probe.argmax(-1)), hidden)
    return gradient.float().norm(dim=-1)


def host_nms(features_ND: Tensor, scores_N: Tensor, *, num_keep: int, threshold: float) -> list[int]:
    """Return the kept tokens in raster order: one at a time, each decided on the host."""
    unit = F.normalize(features_ND.float(), dim=-1)
    order = scores_N.argsort(descending=True, stable=True).tolist()
    suppressed = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    kept: list[int] = []
    for token in order:
        if len(kept) == num_keep:
            break
        if not suppressed[token].item():
            kept.append(token)
            suppressed |= unit @ unit[token] >= threshold
    taken = set(kept)
    kept += [token for token in order if token not in taken][: num_keep - len(kept)]
    return sorted(kept)
