"""Symmetric quantization of a linear layer's weight, and its bytes in ONNX's layout.

INT4 has a scale per block of inputs and output; INT8 and FP8 (E4M3: 4 bits of exponent, 3 of mantissa, up to 448) have one
per output. Scales are rounded to the graph's element type before the values are chosen, so that a graph computes exactly
the values that were chosen.

Letters: O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.quantize.plan import Format
    from trio_edge.runtime.bundle.manifest import FloatType

BLOCK_SIZE = 128
"""Inputs that share an INT4 scale, if it divides the number of inputs."""
_LARGEST = {"int4": 7, "int8": 127, "fp8": 448}
_LEAST_FP8_SCALE = 2.0**-14
"""The smallest normal float16. A larger scale than needed costs FP8 values no precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedWeight:
    """Values and scales of one weight."""

    values_OI: Tensor
    """int8, for INT4 within -8..7; float8_e4m3fn for FP8."""
    scales_OB: Tensor
    """In the graph's element type; B is 1 except for INT4."""
    columns_K: Tensor | None = None
    """Inputs whose values are 0, because ``outliers_OK`` has them in the graph's element type; ascending."""
    outliers_OK: Tensor | None = None

    def dequantized(self) -> Tensor:
        """Return the values [O, I] in the type of the scales, as a graph computes them."""
        blocks = self.values_OI.reshape(*self.scales_OB.shape, -1).to(self.scales_OB.dtype)
        result: Tensor = (blocks * self.scales_OB[..., None]).flatten(1)
        if self.columns_K is not None and self.outliers_OK is not None:
            result[:, self.columns_K] = self.outliers_OK
        return result


def block_size(num_inputs: int) -> int | None:
    """Return the inputs per INT4 block: the largest of 128, 64, 32 and 16 that divides them, else None.

    ONNX Runtime's fast product takes powers of two only: a token of a model with blocks of 96 took 15 times as long.
    """
    sizes = (size for size in (BLOCK_SIZE, 64, 32, 16) if size <= BLOCK_SIZE)
    return next((size for size in sizes if num_inputs % size == 0), None)


def outlier_columns(rows_TI: Tensor, weight_OI: Tensor, *, share: float) -> Tensor:
    """Return the ``share`` of the inputs that add most to the outputs, a multiple of 8 of them, int64 [K], ascending."""
    most_I = rows_TI.square().sum(0) * weight_OI.square().sum(0)
    count = min(max(round(share * len(most_I) / 8), 1) * 8, len(most_I))
    return most_I.topk(count).indices.sort().values


def quantize_weight(
    weight_OI: Tensor,
    *,
    kind: Format,
    dtype: FloatType,
    block: int | None = None,
    columns_K: Tensor | None = None,
) -> QuantizedWeight:
    """Return ``weight_OI`` rounded to the nearest values, computed in float32.

    ``block`` inputs share a scale of type ``dtype``; None means that all inputs do. ``columns_K`` are not rounded.
    """
    outliers_OK = None
    if columns_K is not None:
        outliers_OK = weight_OI[:, columns_K].to(getattr(torch, dtype))
        weight_OI = weight_OI.index_fill(1, columns_K, 0.0)
    blocks_OBK = weight_OI.to(torch.float32).reshape(len(weight_OI), -1, block or weight_OI.shape[1])
    scales_OB = blocks_OBK.abs().amax(-1) / _LARGEST[kind]
    if kind == "fp8":
        scales_OB = scales_OB.clamp(min=_LEAST_FP8_SCALE)
    # rounded first, because the values must fit the scale that the graph multiplies by
    scales_OB = scales_OB.to(getattr(torch, dtype))
    scales_OB = torch.where(scales_OB > 0, scales_OB, 1.0)  # a block of zeros
    values = _nearest(blocks_OBK / scales_OB.to(torch.float32)[..., None], kind)
    return QuantizedWeight(
        values_OI=values.flatten(1), scales_OB=scales_OB, columns_K=columns_K, outliers_OK=outliers_OK
    )


def _nearest(scaled: Tensor, kind: Format) -> Tensor:
    """Return ``scaled`` rounded to ``kind``: ties to even, and too large values to the largest."""
    largest = _LARGEST[kind]
    if kind == "fp8":
        return scaled.clamp(-largest, largest).to(torch.float8_e4m3fn)
    return torch.round(scaled).clamp(-largest - 1, largest).to(torch.int8)


def rounded_activations(values: Tensor, *, largest: float, kind: Format = "int8") -> Tensor:
    """Return ``values`` rounded to INT8 or FP8 and back, with one scale that maps ``largest`` to 127 or 448."""
    scale = activation_scale(largest, kind=kind)
    result: Tensor = _nearest(values / scale, kind).to(values.dtype) * scale
    return result


def activation_scale(largest: float, *, kind: Format = "int8") -> float:
    """Return the scale of inputs with the largest absolute value ``largest``, large enough for float16."""
    if kind == "fp8":  # rounded to float16, so that graphs of both types have the same number
        return float(torch.tensor(max(largest / _LARGEST[kind], _LEAST_FP8_SCALE), dtype=torch.float16))
    return max(largest, 1e-4) / _LARGEST[kind]


def stored_bytes(weight: QuantizedWeight, *, kind: Format) -> tuple[Tensor, ...]:
    """Return values [I, O] (INT4: two per byte, the first in the low half) and scales [B, O] or [O], contiguous.

    With outliers their columns [K] and values [K, O] follow.

    Inputs come first, because a matrix product reads the weight so, and TensorRT and ONNX Runtime recognize INT4
    products by this layout.
    """
    values_IO = weight.values_OI.T.contiguous()
    scales = weight.scales_OB.T.contiguous()
    if kind != "int4":
        return values_IO, scales[0]
    if weight.columns_K is None or weight.outliers_OK is None:
        return pack_int4(values_IO), scales
    return pack_int4(values_IO), scales, weight.columns_K, weight.outliers_OK.T.contiguous()


def pack_int4(values: Tensor) -> Tensor:
    """Return int8 values in -8..7 as bytes of two values, the first in the low half, padded with 0."""
    flat = values.reshape(-1)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = (flat & 0xF).to(torch.uint8).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
