"""Fitted efficiencies by kind of device, and how far off they were on figures that they were not fitted to.

``benchmarks/predict_validation.py`` fits them and prints every figure's error; a test repeats its last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trio_edge.runtime.prediction.speed import Efficiency, Rates

if TYPE_CHECKING:
    from trio_edge.runtime.targets import Target

UNFUSED_SCORE_PASSES = 2.0
"""Of attention that a builder leaves in parts: a score is written, normalized in place and read, in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Efficiencies of tuned runtimes on one kind of device."""

    efficiency: Efficiency
    num_figures: int
    """Published times that they were fitted to."""
    median_error: float
    """Of a figure when all figures of its model are left out of the fit, as a fraction."""
    error_of_nine_in_ten: float
    """Nine of ten such errors are smaller."""
    devices: tuple[str, ...]
    """That figures are of; others of the kind are not validated."""

    def sentence(self, device: str) -> str:
        """Return what a reader of a prediction for ``device`` must know of its error."""
        text = (
            f"half of {self.num_figures} published times of other runtimes were predicted within"
            f" {self.median_error:.0%}, nine in ten within {self.error_of_nine_in_ten:.0%}"
        )
        if device not in self.devices:
            text += f"; none of them on {device}"
        return text


FITTED: dict[str, Fitted] = {
    "jetson": Fitted(
        efficiency=Efficiency(
            plateau={"float16": 0.573, "int8": 0.573, "int4": 0.611},
            rows_for_half=55.2,
            attention=0.722,
            bandwidth=0.826,
            launch_s=6.23e-6,
        ),
        num_figures=100,
        median_error=0.09,
        error_of_nine_in_ten=0.16,
        devices=("jetson-agx-orin-64", "jetson-orin-nx-16", "jetson-orin-nano-8"),
    ),
    "rtx": Fitted(
        efficiency=Efficiency(
            plateau={"float16": 0.906, "int8": 0.906, "int4": 1.026},
            rows_for_half=30.4,
            attention=1.0,
            bandwidth=0.929,
            launch_s=4.82e-6,
        ),
        num_figures=29,
        median_error=0.05,
        error_of_nine_in_ten=0.13,
        devices=("rtx-4090",),
    ),
}
"""By the first part of a device's name. INT8 weights are taken to be multiplied as float16; no figure shows them. A
plateau above 1 means clocks above the specification's."""


def fitted_for(target: Target) -> Fitted:
    """Return the efficiencies for the device's kind."""
    return FITTED[target.name.split("-")[0]]


def rates_of(target: Target) -> Rates:
    """Return the device's peaks for weights that are multiplied in half precision."""
    return Rates(flops=target.fp16_flops, bandwidth=target.bandwidth_bytes_per_s)
