"""``head``: final norm and lm_head on one row, and its most likely tokens.

| I/O tensor        | shape     | dtype   | filled or read by                                    |
|-------------------|-----------|---------|------------------------------------------------------|
| in  hidden_states | [1, S, D] | model   | the last layer range                                 |
| in  last_row      | [1]       | int32   | runtime: the row whose next token is wanted          |
| out logits        | [1, V]    | float32 | runtime, where the candidates do not suffice         |
| out top_logits    | [T]       | float32 | runtime: the largest logits, descending              |
| out top_ids       | [T]       | int32   | runtime: their tokens; the order of equals is free   |

T is min(64, V). With it a decode step copies 512 bytes to the host in place of the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trio_edge.runtime.bundle.graph_io import MAX_CANDIDATES


class Head(nn.Module):
    """Logits of one row of the decoder's output."""

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head

    def forward(self, hidden_states: Tensor, last_row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits [1, V] of row ``last_row`` and the largest of them with their tokens, float32 and int32."""
        row_1D = hidden_states[0].index_select(0, last_row)
        logits_1V = self.lm_head(self.final_norm(row_1D)).to(torch.float32)
        num_candidates = min(MAX_CANDIDATES, logits_1V.shape[1])
        top_logits_1T, top_ids_1T = torch.topk(logits_1V, num_candidates, dim=1)
        return logits_1V, top_logits_1T[0], top_ids_1T[0].to(torch.int32)
