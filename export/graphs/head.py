"""``head``: final norm and lm_head on one row, and the row's most likely tokens.

| I/O tensor        | shape     | dtype   | filled or read by                                    |
|-------------------|-----------|---------|------------------------------------------------------|
| in  hidden_states | [1, S, D] | model   | the last layer range                                 |
| in  last_row      | [1]       | int32   | runtime: the row whose next token is wanted          |
| out logits        | [1, V]    | float32 | runtime, where the candidates do not suffice         |
| out top_logits    | [T]       | float32 | runtime: the largest logits, descending              |
| out top_ids       | [T]       | int32   | runtime: their tokens; the order of equals is free   |

T is min(64, V), so a decode step copies 512 bytes to the host instead of the whole vocabulary. A head that probes share
(``export/graphs/probe.py``) has L instead of 1, and [L, T]. L is 0 while a gradient in the same graph runs, and all probe
rows while a quantized head looks for their likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Logits of one row of the decoder's output."""

    def __init__(
        self, final_norm: nn.Module, lm_head: nn.Module, *, num_candidates: int, is_shared: bool = False
    ) -> None:
        super().__init__()
        self.final_norm, self.lm_head = final_norm, lm_head
        self.num_candidates, self.is_shared = num_candidates, is_shared

    def forward(self, hidden_states: Tensor, last_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of row ``last_row``, the largest of them, and their tokens."""
        row_LD = hidden_states[0].index_select(0, last_row)
        logits_LV = self.lm_head(self.final_norm(row_LD)).to(torch.float32)
        top_logits_LT, top_ids_LT = torch.topk(logits_LV, self.num_candidates, dim=1)
        if not self.is_shared:
            top_logits_LT, top_ids_LT = top_logits_LT[0], top_ids_LT[0]
        return logits_LV, top_logits_LT, top_ids_LT.to(torch.int32)
