"""Rotary tables from position ids, computed in a graph in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTables(nn.Module):
    """cos and sin tables of a decoder.

    The exporter fills in the constant ``inv_freq``, which has no values under FakeTensorMode.
    """

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor, *, attention_scaling: float) -> None:
        """Hold ``inv_freq``, [A, E/2] float32, and the factor on both tables.

        With M-RoPE (A = 3) each frequency belongs to one axis and is 0 at the others.
        """
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)
        self.attention_scaling = attention_scaling

    def forward(self, position_ids_AS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, S, E] float32, in Hugging Face's layout, with two equal halves of E.

        A is 1, or 3 with M-RoPE: time, row and column of each token.
        """
        angles = position_ids_AS[..., None].to(torch.float32) * self.inv_freq[:, None]
        if len(self.inv_freq) > 1:
            angles = angles.sum(dim=0, keepdim=True)  # exact: all but one are 0
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
