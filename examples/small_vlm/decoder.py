"""SmolLM2-135M with low-rank updates and a new projector, written out for training on a CPU.

The base weights are frozen. Each linear layer computes W x + SCALE B A x; q, k and v share one A, gate and up another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from package import SCALE
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

RANK = 16
WIDTH, VISION_WIDTH, HEADS, GROUPS, HEAD_WIDTH, LAYERS = 576, 128, 9, 3, 64, 30
EPSILON, THETA = 1e-5, 100_000.0
VOCABULARY = 49_152


class LowRank(nn.Module):
    """A frozen weight and its update, which starts at zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.float().contiguous(), persistent=False)
        outputs, inputs = weight.shape
        self.a = nn.Parameter(torch.randn(RANK, inputs) * inputs**-0.5)
        self.b = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b * SCALE)


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("norm1", weights["input_layernorm"].float(), persistent=False)
        self.register_buffer("norm2", weights["post_attention_layernorm"].float(), persistent=False)
        self.qkv = LowRank(torch.cat([weights[f"self_attn.{name}_proj"] for name in "qkv"]))
        self.o = LowRank(weights["self_attn.o_proj"])
        self.gu = LowRank(torch.cat([weights["mlp.gate_proj"], weights["mlp.up_proj"]]))
        self.down = LowRank(weights["mlp.down_proj"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        B, S, _ = x.shape
        qkv = self.qkv(F.rms_norm(x, (WIDTH,), self.norm1, EPSILON))
        qkv = qkv.view(B, S, HEADS + 2 * GROUPS, HEAD_WIDTH).transpose(1, 2)
        qk, v = qkv[:, : HEADS + GROUPS], qkv[:, HEADS + GROUPS :]
        qk = torch.addcmul(qk * cos, qk.roll(HEAD_WIDTH // 2, -1), sin)
        k, v = (one.repeat_interleave(HEADS // GROUPS, 1) for one in (qk[:, HEADS:], v))
        seen = F.scaled_dot_product_attention(qk[:, :HEADS], k, v, attn_mask=mask)
        x = x + self.o(seen.transpose(1, 2).reshape(B, S, WIDTH))
        gate, up = self.gu(F.rms_norm(x, (WIDTH,), self.norm2, EPSILON)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class SmallVlm(nn.Module):
    """Projector and decoder; its ``state_dict`` holds what is trained."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        weights = load_file(folder / "model.safetensors")
        (start,) = (
            name.removesuffix("norm.weight") for name in weights if name.endswith("model.norm.weight")
        )
        embedding = weights[f"{start}embed_tokens.weight"][:VOCABULARY].float()
        self.register_buffer("embedding", embedding.contiguous(), persistent=False)
        self.register_buffer("norm", weights[f"{start}norm.weight"].float(), persistent=False)
        self.layers = nn.ModuleList()
        for number in range(LAYERS):
            begin, end = f"{start}layers.{number}.", ".weight"
            own = {name: value for name, value in weights.items() if name.startswith(begin)}
            self.layers.append(Layer({name[len(begin) : -len(end)]: value for name, value in own.items()}))
        self.one, self.two = nn.Linear(VISION_WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.newline = nn.Parameter(torch.randn(WIDTH) * 0.1)

    def project(self, features: Tensor) -> Tensor:
        """Return visual tokens of the tower's patches."""
        return self.two(F.gelu(self.one(features)))

    def forward(self, x_BSD: Tensor, positions_BS: Tensor, mask_B1SS: Tensor) -> Tensor:
        """Return the states before the head; True in the mask lets a row (third axis) see another."""
        inverse = THETA ** (-torch.arange(0, HEAD_WIDTH, 2).float() / HEAD_WIDTH)
        angles = torch.cat([positions_BS[..., None] * inverse] * 2, -1)[:, None]
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(HEAD_WIDTH // 2)
        cos, sin = angles.cos(), angles.sin() * sign
        for layer in self.layers:
            x_BSD = layer(x_BSD, cos, sin, mask_B1SS)
        return F.rms_norm(x_BSD, (WIDTH,), self.norm, EPSILON)
