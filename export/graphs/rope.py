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
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)
        self.attention_scaling = attention_scaling

    def forward(self, position_ids_1S: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, S, E] float32, with the two halves of the head alike (Hugging Face's layout)."""
        angles = position_ids_1S[..., None].to(torch.float32) * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
