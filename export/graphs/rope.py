"""Rotary position tables from position ids, inside a graph. Always float32; the caller casts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class RotaryTables(nn.Module):
    """cos and sin tables of a decoder, from the inverse frequencies of its own configuration.

    ``inv_freq`` is a constant that the exporter fills in: under FakeTensorMode it has no values.
    """

    inv_freq: Tensor

    def __init__(
        self, inv_freq: Tensor, *, attention_scaling: float, mrope_sections: Sequence[int] = ()
    ) -> None:
        """Fix the frequencies.

        Args:
            inv_freq: [E/2] float32.
            attention_scaling: Factor on both tables.
            mrope_sections: Numbers of frequencies that turn with time, height and width in turn (M-RoPE), E/2 in all;
                empty for ordinary positions.
        """
        super().__init__()
        self.register_buffer("inv_freq", inv_freq)
        self.attention_scaling = attention_scaling
        self.mrope_sections = tuple(mrope_sections)

    def forward(self, position_ids_AS: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [1, S, E] float32, with the two halves of the head alike (Hugging Face's layout).

        Args:
            position_ids_AS: A = 1, or 3 with M-RoPE: time, row and column of each token.
        """
        angles = position_ids_AS[..., None].to(torch.float32) * self.inv_freq
        if self.mrope_sections:
            parts = torch.split(angles, list(self.mrope_sections), dim=-1)
            angles = torch.cat([part[index % 3] for index, part in enumerate(parts)], dim=-1)[None]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
