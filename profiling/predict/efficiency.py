"""Fitted efficiencies by kind of device, and how far off they were on figures that they were not fitted to.

``benchmarks/predict_validation.py`` fits them and prints every figure's error; a test holds them to these figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.profiling.predict.speed import Efficiency, Rates

if TYPE_CHECKING:
    from trio_edge.profiling.predict.speed import WeightFormat
    from trio_edge.trio.cost.devices import DeviceSpec

UNFUSED_SCORE_PASSES = 2.0
"""Passes of attention that a builder leaves in parts: a score is written, normalized in place and read, in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Sizes of errors as fractions."""

    median: float
    nine_in_ten: float
    """Nine of ten are smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Efficiencies of tuned runtimes on one kind of device."""

    efficiency: Efficiency
    num_figures: int
    """Published times that they were fitted to."""
    new_model: Errors
    """Error of a figure when all figures of its model are left out of the fit."""
    new_runtime: Errors
    """Error of a figure when all figures of its runtime are left out, as ours is in none."""
    devices: tuple[str, ...]
    """That figures are of; others of the kind are not validated."""

    def sentence(self, device: str) -> str:
        """Return what a reader of a prediction for ``device`` must know of its error."""
        text = (
            f"{self.num_figures} published times of other runtimes were predicted with a median error of"
            f" {self.new_runtime.median:.0%}, nine in ten within {self.new_runtime.nine_in_ten:.0%}, when nothing of their"
            f" runtime was known ({self.new_model.median:.0%} and {self.new_model.nine_in_ten:.0%} when only their model"
            " was not)"
        )
        if device not in self.devices:
            text += f"; none of them is of {device}"
        return text


FITTED: dict[str, Fitted] = {
    "jetson": Fitted(
        efficiency=Efficiency(
            plateau=0.603, rows_for_half=54.4, attention=0.781, bandwidth=0.830, launch_s=6.40e-6
        ),
        num_figures=114,
        new_model=Errors(median=0.08, nine_in_ten=0.16),
        new_runtime=Errors(median=0.12, nine_in_ten=0.23),
        devices=("jetson-agx-orin-64", "jetson-orin-nx-16", "jetson-orin-nano-8"),
    ),
    "rtx": Fitted(
        efficiency=Efficiency(
            plateau=0.953, rows_for_half=35.4, attention=0.867, bandwidth=0.930, launch_s=4.84e-6
        ),
        num_figures=29,
        new_model=Errors(median=0.06, nine_in_ten=0.16),
        new_runtime=Errors(median=0.13, nine_in_ten=0.27),
        devices=("rtx-4090",),
    ),
}
"""By the first part of a device's name."""


def fitted_for(device: DeviceSpec) -> Fitted:
    """Return the efficiencies for the device's kind."""
    return FITTED[device.name.split("-")[0]]


def rates_of(device: DeviceSpec) -> Rates:
    """Return the device's peaks."""
    low: dict[WeightFormat, float] = {"int8": device.int8_ops}
    if device.fp8_flops is not None:
        low["fp8"] = device.fp8_flops
    return Rates(flops=device.fp16_flops, low_flops=low, bandwidth=device.bandwidth_bytes_per_s)
