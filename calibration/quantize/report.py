"""Report of a quantization's calibration, a part of ``calibration.json``."""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_edge.runtime.bundle.manifest import QuantizedFormat  # noqa: TC001 - msgspec reads the annotations

Method = Literal["round-to-nearest", "awq", "smoothquant", "awq+smoothquant"]
SectionPart = Literal["vision", "decoder", "head"]


class GroupError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Error of a group of linear layers with one input, compared with floating point, on collected inputs."""

    part: SectionPart
    layer: int | None
    """Layer of the vision tower or the decoder; None for projector and head."""
    group: str
    """Name of the linear layers: "qkv", "o", "gate_up", "down", "fc1", "fc2", "projector_1", "projector_2" or "lm_head"."""
    format: QuantizedFormat
    rounded: float
    """Sum of squared errors of the outputs over their sum of squares, with weights rounded to nearest."""
    calibrated: float
    """The same as the bundle computes it: with factors, and in INT8 and FP8 with eight-bit inputs."""
    moved: bool
    """Whether the bundle has factors for the group."""


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Range of one layer's INT8 KV cache."""

    layer: int
    key_max: float
    """Largest absolute key after rotation; it becomes 127."""
    value_max: float
    """Largest absolute value, after smoothing."""


class QuantizationReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quantization of vision graph, decoder, head and KV caches."""

    method: Method
    samples: int
    errors: list[GroupError]
    """Empty if only the KV caches are quantized."""
    caches: list[CacheReport] = []
    """One per layer, if the KV caches are quantized."""
