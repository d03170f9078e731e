"""Reads a checkpoint's weights, stored as floating point or as packed integers and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.export.checkpoints.weights import check_finite, read_tensor
from trio_edge.export.quantize.numerics import BLOCK_SIZE, QuantizedWeight
from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from trio_edge.export.checkpoints.checkpoint import Checkpoint
    from trio_edge.export.checkpoints.packed import PackedWeight
    from trio_edge.runtime.bundle.manifest import FloatType

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output of each four bits of an AWQ word, the lowest first."""
_MIDDLE = 8
"""Added to symmetric integers to make them unsigned."""


def read_weight(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return the values of a tensor; a packed weight is dequantized to float32.

    Raises:
        CheckpointError: If the file cannot be read, or the packing is not supported.
    """
    packed = checkpoint.packed.get(name)
    if packed is None:
        return read_tensor(checkpoint.tensor(name))
    integers_OI = _integers(packed, name) - _zeros(packed)
    _check_order(packed, name)
    return QuantizedWeight(values_OI=integers_OI, scales_OB=_scales(packed, name)).dequantized()


def taken_over(checkpoint: Checkpoint, name: str, *, dtype: FloatType) -> QuantizedWeight:
    """Return the integers and scales of a packed weight for a bundle; blocks above 128 are divided.

    Raises:
        CheckpointError: If the file cannot be read, or the packing is asymmetric or reorders inputs.
    """
    packed = checkpoint.packed[name]
    _check_order(packed, name)
    zeros = _zeros(packed)
    if packed.zeros is not None and not bool((zeros == _MIDDLE).all()):
        raise CheckpointError(
            f"{packed.zeros.file} {name}: expected zero points of {_MIDDLE} (symmetric), got others; add"
            " --quantize int4 to round the weights again"
        )
    scales_OB = _scales(packed, name).to(getattr(torch, dtype))
    check_finite(scales_OB, packed.scales, name=name)
    repeated = packed.block // stored_block(packed)
    return QuantizedWeight(
        values_OI=_integers(packed, name) - zeros, scales_OB=scales_OB.repeat_interleave(repeated, dim=1)
    )


def stored_block(packed: PackedWeight) -> int:
    """Return the inputs per block in the bundle: the checkpoint's, or 128 if that divides them."""
    return BLOCK_SIZE if packed.block % BLOCK_SIZE == 0 else packed.block


def _integers(packed: PackedWeight, name: str) -> Tensor:
    """Return the integers as int8 [O, I], 0 to 15."""
    words = read_tensor(packed.values)
    if packed.format.layout == "awq":
        return _awq_columns(words).T
    if packed.format.layout == "gptq":
        return _nibbles(words.T).contiguous()
    if packed.format.layout == "compressed-tensors":
        return _nibbles(words)
    low, high = words & 0xF, words >> 4  # of two outputs, in two's complement: add 8 modulo 16
    both = torch.stack([low, high], dim=1).reshape(packed.shape).to(torch.int8)
    return (both + _MIDDLE) & 0xF


def _nibbles(words: Tensor) -> Tensor:
    """Return the four-bit parts of int32 words as int8 [rows, 8 columns], the lowest bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xF).to(torch.int8).flatten(-2)


def _awq_columns(words: Tensor) -> Tensor:
    """Return the four-bit parts of AWQ words as int8 [rows, 8 columns], in the order of the outputs."""
    shuffled = _nibbles(words).reshape(len(words), -1, 8)
    in_order = torch.empty_like(shuffled)
    in_order[..., list(_AWQ_ORDER)] = shuffled
    return in_order.flatten(1)


def _zeros(packed: PackedWeight) -> Tensor:
    """Return the zero point of each integer, int8 [O, I]; [1, 1] if all are 8."""
    if packed.zeros is None:
        return torch.full((1, 1), _MIDDLE, dtype=torch.int8)
    words = read_tensor(packed.zeros)
    columns = _awq_columns(words) if packed.format.layout == "awq" else _nibbles(words)
    zeros_OB = (columns.T + packed.format.stored_zero_offset).to(torch.int8)
    return zeros_OB.repeat_interleave(packed.block, dim=1)


def _scales(packed: PackedWeight, name: str) -> Tensor:
    """Return the scales, float32 [O, B]."""
    scales = read_tensor(packed.scales).to(torch.float32)
    check_finite(scales, packed.scales, name=name)
    return scales.T.contiguous() if packed.format.layout in ("awq", "gptq") else scales


def _check_order(packed: PackedWeight, name: str) -> None:
    if packed.order is None:
        return
    expected_I = torch.arange(packed.shape[1]) // packed.block
    if not torch.equal(read_tensor(packed.order).to(torch.int64), expected_I):
        raise CheckpointError(
            f"{packed.order.file} {name}: expected blocks of neighbouring inputs, got reordered ones (desc_act); export the"
            " checkpoint that was not quantized"
        )
