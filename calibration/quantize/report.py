"""Report of a quantization's calibration, as ``calibration.json`` holds it."""

from __future__ import annotations

from typing import Literal

import msgspec

from trio_edge.runtime.bundle.manifest import QuantizedFormat  # noqa: TC001 - msgspec reads the annotations


class GroupError(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Error of linear layers with one input against floating point, on collected inputs."""

    part: Literal["vision", "decoder", "head"]
    layer: int | None
    """Layer of the vision tower or the decoder; None for projector and head."""
    group: str
    """Name of the linear layers: "qkv", "o", "gate_up", "down", "fc1", "fc2", "projector_1", "projector_2" or "lm_head"."""
    format: QuantizedFormat
    rounded: float
    """Sum of squared errors over the sum of squared outputs with weights rounded to nearest."""
    calibrated: float
    """The same as the bundle computes it, in INT8 and FP8 with its inputs in eight bits too."""
    moved: bool


class CacheReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Range of one layer's INT8 KV cache."""

    layer: int
    key_max: float
    """Largest absolute key, after the rotation, that was collected: it becomes 127."""
    value_max: float
    """Largest absolute value, after smoothing."""


class QuantizationReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quantization of vision graph, decoder and head."""

    method: Literal["round-to-nearest", "awq", "smoothquant", "awq+smoothquant"]
    samples: int
    errors: list[GroupError]
    """Empty where the KV caches alone are quantized."""
    caches: list[CacheReport] = []
    """One for every layer, where they are quantized."""
