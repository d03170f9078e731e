"""``head``: final norm and lm_head on one row.

| I/O tensor        | shape     | dtype   | filled or read by                                    |
|-------------------|-----------|---------|------------------------------------------------------|
| in  hidden_states | [1, S, D] | model   | the last layer range                                 |
| in  last_row      | [1]       | int32   | runtime: the row whose next token is wanted          |
| out logits        | [1, V]    | float32 | runtime                                              |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Head(nn.Module):
    """Logits of one row of the decoder's output."""

    def __init__(self, final_norm: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.final_norm = final_norm
        self.lm_head = lm_head

    def forward(self, hidden_states: Tensor, last_row: Tensor) -> Tensor:
        """Return the logits [1, V] of row ``last_row``, float32."""
        row_1D = hidden_states[0].index_select(0, last_row)
        logits: Tensor = self.lm_head(self.final_norm(row_1D)).to(torch.float32)
        return logits
