"""Checkpoints whose decoder layers are packed INT4, made from known integers as the packing tools lay them out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 16
CONFIGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": BLOCK, "zero_point": False, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": BLOCK, "sym": True, "desc_act": False},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "symmetric": True, "strategy": "group"},
            }
        },
    },
    "modelopt": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
}


@dataclass(frozen=True)
class Integers:
    """One weight."""

    values: Tensor
    """int64 [O, I], -8 to 7; its scales are [O, B]."""
    scales: Tensor

    def dequantized(self) -> Tensor:
        return (self.values.unflatten(1, (-1, BLOCK)) * self.scales[..., None]).flatten(1)


def write_packed(
    source: Path, folder: Path, *, method: str, settings: dict[str, Any] | None = None, zero: int = 8
) -> dict[str, Integers]:
    """Write a copy of ``source`` with packed decoder layers into ``folder`` and return the integers, by module.

    Args:
        source: A checkpoint in one file.
        folder: Does not exist.
        method: A key of ``CONFIGS``.
        settings: Written over the configuration of that method.
        zero: The zero point, 8 where symmetric; awq and gptq only.
    """
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = CONFIGS[method] | (settings or {})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    packed: dict[str, Tensor] = {}
    known = {}
    for name, weight in tensors.items():
        module = name.removesuffix(".weight")
        if "language_model" not in name or not module.endswith("_proj"):
            packed[name] = weight
            continue
        rows, columns = weight.shape
        values = torch.randint(-8, 8, (rows, columns), generator=generator)
        scales = 0.02 + 0.1 * torch.rand(rows, columns // BLOCK, generator=generator)
        known[module] = Integers(values, scales)
        packed |= {f"{module}.{key}": value for key, value in _PACK[method](values, scales, zero).items()}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    return known


def _words(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Return int32 words of eight columns of 0..15 each; ``order[i]`` is the column in the i-th lowest bits."""
    eight = values.unflatten(1, (-1, 8))[..., list(order)]
    words = sum(eight[..., place] << 4 * place for place in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def _awq(values_OI: Tensor, scales_OB: Tensor, zero: int) -> dict[str, Tensor]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    zeros_BO = torch.full_like(scales_OB.T, zero, dtype=torch.int64)
    return {
        "qweight": _words((values_OI.T + 8).contiguous(), order),
        "qzeros": _words(zeros_BO, order),
        "scales": scales_OB.T.contiguous(),
    }


def _gptq(values_OI: Tensor, scales_OB: Tensor, zero: int) -> dict[str, Tensor]:
    zeros_BO = torch.full_like(scales_OB.T, zero - 1, dtype=torch.int64)
    return {
        "qweight": _words(values_OI + 8).T.contiguous(),
        "qzeros": _words(zeros_BO),
        "scales": scales_OB.T.contiguous(),
        "g_idx": (torch.arange(values_OI.shape[1]) // BLOCK).to(torch.int32),
    }


def _compressed(values_OI: Tensor, scales_OB: Tensor, _zero: int) -> dict[str, Tensor]:
    shape = torch.tensor(values_OI.shape)
    return {"weight_packed": _words(values_OI + 8), "weight_scale": scales_OB, "weight_shape": shape}


def _modelopt(values_OI: Tensor, scales_OB: Tensor, _zero: int) -> dict[str, Tensor]:
    low, high = values_OI[0::2] & 0xF, values_OI[1::2] & 0xF
    return {"weight": (low | high << 4).to(torch.uint8), "weight_scale": scales_OB}


_PACK = {"awq": _awq, "gptq": _gptq, "compressed-tensors": _compressed, "modelopt": _modelopt}
