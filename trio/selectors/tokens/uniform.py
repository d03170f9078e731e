"""Evenly spaced tokens: the baseline that a selector must beat.

Token k of K is the middle of the k-th of K equal shares of the n real tokens, newlines included: ⌊(2k + 1) n / 2K⌋.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs
from trio_edge.trio.selectors.tokens.candidates import exact_selection, real_tokens


class Uniform(KeepingModule):
    """Evenly spaced tokens; no parameters."""

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores are 1 for the kept tokens and 0 for the others."""
        real_N = real_tokens(inputs, num_keep=self.num_keep)
        kept_K = evenly_spaced(inputs.num_visual, num_keep=self.num_keep)
        return exact_selection(kept_K, marks(kept_K, num_tokens=real_N.shape[0]), real_N)


def evenly_spaced(num_visual: Tensor, *, num_keep: int) -> Tensor:
    """Return evenly spaced indices below ``num_visual`` [1], ascending, int64 [K]; 0..K-1 if there are at most K tokens."""
    place_K = torch.arange(num_keep, device=num_visual.device)
    count = num_visual.reshape(1).to(torch.int64)
    spaced_K = torch.div((2 * place_K + 1) * count, 2 * num_keep, rounding_mode="trunc")
    return torch.where(count > num_keep, spaced_K, place_K)


def marks(index_K: Tensor, *, num_tokens: Any) -> Tensor:
    """Return 1 at the indices in ``index_K``, 0 elsewhere, float32 [N]; N may be symbolic."""
    index_N = torch.arange(num_tokens, device=index_K.device)
    return (index_K[:, None] == index_N[None, :]).to(torch.float32).amax(0)
