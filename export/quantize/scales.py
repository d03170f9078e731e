"""The result of a calibration: smoothing factors and the largest activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from trio_edge.runtime.bundle.errors import ScheduleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from trio_edge.export.quantize.plan import QuantizePlan

Calibrated = Literal["round-to-nearest", "awq", "smoothquant", "awq+smoothquant", "checkpoint"]
"""The method that chose the integers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Smoothing:
    """Factors of one tensor that another tensor's factors cancel, so that the model computes the same."""

    inputs: Tensor | None = None
    """[I], multiplied into the columns of a weight [O, I]."""
    outputs: Tensor | None = None
    """[O], divide the rows of a weight, or the elements of a norm's weight or of a bias."""

    def apply(self, values: Tensor) -> Tensor:
        """Return ``values`` with the factors applied, float32."""
        result = values.to(torch.float32)
        if self.inputs is not None:
            result = result * self.inputs
        if self.outputs is not None:
            result = result / (self.outputs if result.dim() == 1 else self.outputs[:, None])
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRange:
    """The range of one layer's KV cache."""

    key: float
    """Largest absolute key, after RoPE."""
    value: float
    """Largest absolute value, after smoothing."""


NO_CACHE = CacheRange(key=0.0, value=0.0)
"""In place of the range of a layer with linear attention, which has states."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CalibratedScales:
    """The result of a calibration, by the canonical names of the checkpoint's tensors."""

    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)
    """Factors for weights, norms and biases."""
    activation_max: Mapping[str, float] = field(default_factory=dict)
    """Largest absolute input of each linear layer after smoothing, by its weight; for parts in INT8 and FP8."""
    outliers: Mapping[str, Tensor] = field(default_factory=dict)
    """Columns of INT4 weights that stay in floating point, int64 [K]."""
    cache_max: tuple[CacheRange, ...] = ()
    """Ranges of all decoder layers, for an INT8 KV cache."""
    method: Calibrated = "round-to-nearest"
    num_samples: int = 0


def check_calibrated(plan: QuantizePlan, scales: CalibratedScales) -> None:
    """Raise ScheduleError if ``plan`` has an INT8 KV cache or outliers, and there was no calibration."""
    found = scales.cache_max if plan.has_cache else not plan.outliers or scales.num_samples
    if not found:
        what = "kv=int8 with scales of keys and values" if plan.has_cache else "outliers with columns"
        raise ScheduleError(
            f"--quantize: expected {what} from a calibration, got none; run trio-calibrate with the same --quantize"
        )
