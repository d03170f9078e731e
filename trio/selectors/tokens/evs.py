"""EVS: keeps the K tokens of a pair of frames that changed most since the previous pair.

Source: arXiv 2510.14624 (Efficient Video Sampling).

    change(i) = 1 − cos(x_i, y_i)

x are the visual tokens of a pair of frames as the decoder reads them, y those of the previous pair at the same places.

Differences from the original:
- The original keeps a share of all tokens of a video. Here each pair keeps K, so that all shapes are fixed and a stream
  needs no look-ahead.
- The original keeps the whole first pair. Here the first pair, or an image, keeps K evenly spaced tokens, as ``uniform``:
  without changes all scores are equal, and the lower index would keep only the top rows.
- A zero row is at distance 1 from every other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs, best_tokens
from trio_edge.trio.selectors.tokens.candidates import exact_selection, given, real_tokens, unit_rows
from trio_edge.trio.selectors.tokens.uniform import evenly_spaced, marks


class Evs(KeepingModule):
    """EVS; no parameters."""

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores are changes, 0 to 2; in the first pair 1 at kept tokens, 0 elsewhere."""
        real_N = real_tokens(inputs, num_keep=self.num_keep)
        is_later = given(inputs.has_previous, "has_previous").reshape(1) > 0
        spaced_K = evenly_spaced(inputs.num_visual, num_keep=self.num_keep)
        change_N = _change(inputs, real_N)
        score_N = torch.where(
            is_later, change_N, marks(spaced_K, num_tokens=real_N.shape[0]).to(change_N.dtype)
        )
        kept_K = best_tokens(score_N, inputs.num_visual, num_keep=self.num_keep)
        return exact_selection(kept_K, score_N, real_N)


def _change(inputs: TokenInputs, real_N: Tensor) -> Tensor:
    """Return 1 − cosine of each token and the one at the same place in the previous pair, [N], 0 to 2."""
    unit_ND = unit_rows(inputs.tokens_ND, real_N)
    before_ND = unit_rows(given(inputs.previous_ND, "previous_ND"), real_N)
    return (1.0 - (unit_ND * before_ND).sum(-1)).clamp(0.0, 2.0)
