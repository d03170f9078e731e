"""Rotary position tables from position ids, inside a graph. Always float32; the caller casts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTables(nn.Module):
    """cos and sin tables of a decoder, from the inverse frequencies of its own configuration.

    ``inv_freq`` is a constant that the exporter fills in: under FakeTensorMode it has no values.
    """

    inv_freq: Tensor

    def __init__(self, inv_freq: Tensor, *, attention_scaling: float) -> None:
        """Fix the frequencies.

        Args:
            inv_freq: [A, E/2] float32. With M-RoPE, A = 3, each frequency turns with one axis and is 0 at the others.
            attention_scaling: Factor on both tables.
        """
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)
        self.attention_scaling = attention_scaling

    def forward(self, position_ids_AS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, S, E] float32, with the two halves of the head alike (Hugging Face's layout).

        Args:
            position_ids_AS: A = 1, or 3 with M-RoPE: time, row and column of each token.
        """
        angles = position_ids_AS[..., None].to(torch.float32) * self.inv_freq[:, None]
        if len(self.inv_freq) > 1:
            angles = angles.sum(dim=0, keepdim=True)  # exact: all but one are 0
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
