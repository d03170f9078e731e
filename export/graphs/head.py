"""``head``: final norm and lm_head on some rows, and their most likely tokens.

| I/O tensor        | shape     | dtype   | filled or read by                                    |
|-------------------|-----------|---------|------------------------------------------------------|
| in  hidden_states | [1, S, D] | model   | the last layer range                                 |
| in  last_row      | [L]       | int32   | runtime: the rows whose next tokens are wanted       |
| out logits        | [L, V]    | float32 | runtime, where the candidates do not suffice         |
| out top_logits    | [L, T]    | float32 | runtime: the largest logits, descending              |
| out top_ids       | [L, T]    | int32   | runtime: their tokens; the order of equals is free   |
| out last_hidden_states | [1, S, D] | model | runtime: all rows after the norm (--outputs hidden) |

T is min(64, V), so a decode step copies 512 bytes a row to the host instead of the whole vocabulary. L is 1 in a prefill and
all rows of a decode step; 0 while a probe's gradient in the same graph runs (``export/graphs/probe.py``), and all probe rows
while a quantized head looks for their likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Logits of some rows of the decoder's output."""

    def __init__(
        self, final_norm: nn.Module, lm_head: nn.Module, *, num_candidates: int, has_hidden: bool = False
    ) -> None:
        super().__init__()
        self.final_norm, self.lm_head, self.num_candidates = final_norm, lm_head, num_candidates
        self.has_hidden = has_hidden

    def forward(self, hidden_states: Tensor, last_row: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of the rows ``last_row``, the largest of each, and their tokens; then all rows, if wanted."""
        row_LD = hidden_states[0].index_select(0, last_row)
        logits_LV = self.lm_head(self.final_norm(row_LD)).to(torch.float32)
        top_logits_LT, top_ids_LT = torch.topk(logits_LV, self.num_candidates, dim=1)
        results = logits_LV, top_logits_LT, top_ids_LT.to(torch.int32)
        return (*results, self.final_norm(hidden_states)) if self.has_hidden else results
