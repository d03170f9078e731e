"""Finds the INT4 weights of checkpoints that are quantized already, by AWQ, GPTQ, compressed-tensors or Model Optimizer.

Every packed linear layer becomes one tensor of the checkpoint, with its weight's shape [O, I] and the dtype ``PACKED``.
``PackedWeight`` holds the places of its integers and scales. Only headers are read here; ``quantize/unpacking.py`` reads the
values.

| layout             | integers                                     | scales   | zero points                        |
|--------------------|----------------------------------------------|----------|------------------------------------|
| awq                | int32 [I, O/8], outputs 0 2 4 6 1 3 5 7      | [I/g, O] | like the integers, [I/g, O/8]      |
| gptq               | int32 [I/8, O], inputs in order              | [I/g, O] | int32 [I/g, O/8], one less (v1)    |
| compressed-tensors | int32 [O, I/8], inputs in order, 8 added     | [O, I/g] | none where symmetric               |
| modelopt           | uint8 [O/2, I], two outputs, two's complement | [O, I/g] | none                               |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from trio_edge.runtime.bundle.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from trio_edge.export.checkpoints.weights import SourceTensor

Layout = Literal["awq", "gptq", "compressed-tensors", "modelopt"]
PACKED = "INT4"
"""dtype of a packed weight among a checkpoint's tensors; no safetensors file has it."""
PACKING = "quantization_config"
"""Key of config.json in checkpoints that are quantized already."""
_PARTS: dict[Layout, tuple[str, str, tuple[int, int]]] = {
    "awq": ("qweight", "scales", (1, 8)),
    "gptq": ("qweight", "scales", (8, 1)),
    "compressed-tensors": ("weight_packed", "weight_scale", (1, 8)),
    "modelopt": ("weight", "weight_scale", (2, 1)),
}
"""Names of a layer's integers and scales; rows and columns of four bits in one stored integer."""
_MORE_PARTS = ("qzeros", "g_idx", "weight_shape", "weight_g_idx")
"""Other tensors of a packed layer. The last two are not read."""
_WAY_OUT = "export the checkpoint that was not quantized"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedFormat:
    """The packing that a checkpoint's configuration describes."""

    layout: Layout
    is_symmetric: bool
    """Whether every zero point is 8, the middle."""
    stored_zero_offset: int = 0
    """Added to a stored zero point."""

    @property
    def is_blocks_first(self) -> bool:
        """Whether integers are [I, O] and scales [B, O], not [O, I] and [O, B]."""
        return self.layout in ("awq", "gptq")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedWeight:
    """One linear layer's INT4 weight."""

    format: PackedFormat
    shape: tuple[int, int]
    """[O, I]."""
    values: SourceTensor
    scales: SourceTensor
    zeros: SourceTensor | None
    order: SourceTensor | None
    """GPTQ's ``g_idx`` [I], the block of each input."""

    @property
    def num_blocks(self) -> int:
        """Blocks, and scales, per output."""
        return self.scales.shape[0 if self.format.is_blocks_first else 1]

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.shape[1] // self.num_blocks


def packed_format(folder: Path, said: Any) -> PackedFormat:
    """Return the packing that ``said``, the value of ``PACKING`` in config.json, describes.

    Raises:
        CheckpointError: If the packing is not supported.
    """
    method = said.get("quant_method") if isinstance(said, dict) else None
    if method == "awq":
        _require(folder, "version", said.get("version", "gemm"), ("gemm", "GEMM"))
        _require(folder, "bits", said.get("bits", said.get("w_bit")), (4,))
        return PackedFormat(layout="awq", is_symmetric=not said.get("zero_point", True))
    if method == "gptq":
        _require(folder, "bits", said.get("bits"), (4,))
        _require(folder, "desc_act", said.get("desc_act", False), (False,))
        # AutoGPTQ's first format stores zero points minus one
        is_v1 = said.get("checkpoint_format", "gptq") == "gptq"
        return PackedFormat(
            layout="gptq", is_symmetric=bool(said.get("sym", True)), stored_zero_offset=int(is_v1)
        )
    if method == "compressed-tensors":
        _require(folder, "format", said.get("format"), ("pack-quantized",))
        groups = said.get("config_groups", {})
        for group in groups.values() if isinstance(groups, dict) else (groups,):
            weights = (group.get("weights") if isinstance(group, dict) else None) or {}
            _require(folder, "num_bits", weights.get("num_bits"), (4,))
            _require(folder, "symmetric", weights.get("symmetric", True), (True,))
            # "group" would mix the inputs of a block
            _require(folder, "actorder", weights.get("actorder"), (None, "static", "weight"))
        return PackedFormat(layout="compressed-tensors", is_symmetric=True)
    if method == "modelopt":
        _require(folder, "quant_algo", said.get("quant_algo"), ("W4A16_AWQ",))
        return PackedFormat(layout="modelopt", is_symmetric=True)
    raise CheckpointError(
        f"{folder}/config.json quantization_config: expected awq, gptq, compressed-tensors or modelopt, got {method!r};"
        f" {_WAY_OUT}"
    )


def _require(folder: Path, name: str, got: object, wanted: tuple[object, ...]) -> None:
    if got not in wanted:
        raise CheckpointError(
            f"{folder}/config.json quantization_config.{name}: expected {' or '.join(map(repr, wanted))}, got {got!r}, which is"
            f" not supported; {_WAY_OUT}"
        )


def with_packed(
    folder: Path, tensors: Mapping[str, SourceTensor], form: PackedFormat
) -> tuple[dict[str, SourceTensor], dict[str, PackedWeight]]:
    """Return the tensors with one for each packed weight, and the packed weights by name.

    Raises:
        CheckpointError: If parts of a packed weight are missing or do not fit together.
    """
    result, packed = dict(tensors), {}
    values_name, scales_name, packing = _PARTS[form.layout]
    for scales_key in [name for name in tensors if name.endswith(f".{scales_name}")]:
        layer = scales_key.removesuffix(f".{scales_name}")
        if f"{layer}.pre_quant_scale" in tensors:
            raise CheckpointError(
                f"{folder} tensor '{layer}.pre_quant_scale': expected no scales of a layer's inputs, got some; {_WAY_OUT}"
            )
        names = (values_name, scales_name, *_MORE_PARTS)
        parts = {name: result.pop(f"{layer}.{name}", None) for name in names}
        values, scales = parts[values_name], tensors[scales_key]
        if values is None:
            raise CheckpointError(
                f"{folder}: expected a tensor '{layer}.{values_name}' for its scales, got none; download the checkpoint again"
            )
        for name, part in ((values_name, values), (scales_name, scales)):
            if len(part.shape) != 2:
                raise CheckpointError(
                    f"{folder} tensor '{layer}.{name}': expected two axes, got shape {list(part.shape)}; download the"
                    " checkpoint again"
                )
        rows, columns = (size * count for size, count in zip(values.shape, packing))
        weight = PackedWeight(
            format=form,
            shape=(columns, rows) if form.is_blocks_first else (rows, columns),
            values=values,
            scales=scales,
            zeros=parts["qzeros"],
            order=parts["g_idx"],
        )
        outputs = scales.shape[1 if form.is_blocks_first else 0]
        if outputs != weight.shape[0] or weight.shape[1] % max(weight.num_blocks, 1):
            raise CheckpointError(
                f"{folder} {layer}: expected scales for {weight.shape[0]} outputs and equal blocks of {weight.shape[1]} inputs,"
                f" got {list(scales.shape)}; download the checkpoint again"
            )
        packed[f"{layer}.weight"] = weight
        result[f"{layer}.weight"] = replace(values, dtype=PACKED, shape=weight.shape)
    return result, packed
