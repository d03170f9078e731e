"""Symmetric quantization of a linear layer's weight, and the bytes that ONNX wants.

INT4 has a scale for each block of inputs of each output, INT8 and FP8 (E4M3: four bits of exponent, three of mantissa, up to
448) one for each output. Scales are rounded to the graph's element type before the values are chosen, so that a graph reads
back exactly what was rounded to.

Letters: O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.runtime.bundle.manifest import FloatType

Format = Literal["none", "int4", "int8", "fp8"]
FORMATS: tuple[Format, ...] = ("none", "int4", "int8", "fp8")
BLOCK_SIZE = 128
"""Inputs that share an INT4 scale, where the number of inputs is a multiple of it."""
_BLOCK_STEP = 16
_LARGEST = {"int4": 7, "int8": 127, "fp8": 448}
_LEAST_FP8_SCALE = 2.0**-14
"""The smallest number that float16 has with all its bits. FP8 numbers lose none of theirs by being smaller than they could be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """Values and scales of one weight."""

    values_OI: Tensor
    """int8, of INT4 within -8..7; float8_e4m3fn for FP8."""
    scales_OB: Tensor
    """In the graph's element type; one block but for INT4."""

    def dequantized(self) -> Tensor:
        """Return [O, I] in the type of the scales, as a graph computes it."""
        blocks = self.values_OI.reshape(*self.scales_OB.shape, -1).to(self.scales_OB.dtype)
        result: Tensor = (blocks * self.scales_OB[..., None]).flatten(1)
        return result


def block_size(num_inputs: int) -> int | None:
    """Return the inputs of an INT4 block: 128, else the largest multiple of 16 below that divides; None without one."""
    if num_inputs % BLOCK_SIZE == 0:
        return BLOCK_SIZE
    sizes = range(_BLOCK_STEP, BLOCK_SIZE, _BLOCK_STEP)
    return max((size for size in sizes if num_inputs % size == 0), default=None)


def quantize(
    weight_OI: Tensor, *, kind: Format, dtype: FloatType, block: int | None = None
) -> QuantizedWeight:
    """Return ``weight_OI`` rounded to the nearest value of its block's scale; the arithmetic is float32.

    ``block`` inputs share a scale of type ``dtype``; all of them but for INT4.
    """
    blocks_OBK = weight_OI.to(torch.float32).reshape(len(weight_OI), -1, block or weight_OI.shape[1])
    scales_OB = blocks_OBK.abs().amax(-1) / _LARGEST[kind]
    if kind == "fp8":
        scales_OB = scales_OB.clamp(min=_LEAST_FP8_SCALE)
    # rounded before the values are chosen: they have to fit the scale that the graph multiplies by
    scales_OB = scales_OB.to(getattr(torch, dtype))
    scales_OB = torch.where(scales_OB > 0, scales_OB, 1.0)  # a block of zeros
    values = _nearest(blocks_OBK / scales_OB.to(torch.float32)[..., None], kind)
    return QuantizedWeight(values_OI=values.flatten(1), scales_OB=scales_OB)


def _nearest(scaled: Tensor, kind: Format) -> Tensor:
    """Return ``scaled`` as the nearest numbers of ``kind``; ties go to the even one, what is too large to the largest."""
    largest = _LARGEST[kind]
    if kind == "fp8":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
    return torch.round(scaled).clamp(-largest - 1, largest).to(torch.int8)


def rounded_activations(values: Tensor, *, largest: float, kind: Format = "int8") -> Tensor:
    """Return ``values`` rounded to INT8 or FP8 and back with the one scale that takes ``largest`` to 127 or 448."""
    scale = activation_scale(largest, kind=kind)
    result: Tensor = _nearest(values / scale, kind).to(values.dtype) * scale
    return result


def activation_scale(largest: float, *, kind: Format = "int8") -> float:
    """Return the scale of inputs whose largest absolute value is ``largest``; never so small that float16 loses it."""
    if kind == "fp8":  # as float16 has it: the same number in graphs of either type
        return float(torch.tensor(max(largest / _LARGEST[kind], _LEAST_FP8_SCALE), dtype=torch.float16))
    return max(largest, 1e-4) / _LARGEST[kind]


def stored_bytes(weight: QuantizedWeight, *, kind: Format) -> tuple[Tensor, Tensor]:
    """Return values [I, O] (INT4: two in a byte, the first in the low half) and scales [B, O] or [O], contiguous.

    Inputs come first: that is the operand that a matrix product reads, and the layout that TensorRT and ONNX Runtime
    know INT4 products by.
    """
    values_IO = weight.values_OI.T.contiguous()
    scales = weight.scales_OB.T.contiguous()
    return (pack_int4(values_IO), scales) if kind == "int4" else (values_IO, scales[0])


def pack_int4(values: Tensor) -> Tensor:
    """Return int8 values of -8..7 as bytes, two in each, the first in the low half; an odd end is filled with 0."""
    flat = values.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = (flat & 0xF).to(torch.uint8).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
