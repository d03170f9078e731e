"""Predicted time of a graph: each product and attention takes the longer time of arithmetic and memory.

    product      max(FLOPs / (peak e), bytes / (bandwidth b)),   e = plateau rows / (rows + rows_for_half);
                 e = plateau below 16 rows, for which libraries have other kernels;
                 peak is that of half precision, or of eight bits if both weights and inputs have them
    attention    max(FLOPs / (peak a), bytes / (bandwidth b)) + scores · passes · 4 / (bandwidth b)
    the rest     bytes / (bandwidth b)
    launches     a constant each

``peak`` and ``bandwidth`` are the device's; the other values, an ``Efficiency``, are fitted to measured times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.trio.cost.devices import DeviceSpec
    from trio_edge.trio.cost.work import Product, WeightKind, Work


WeightFormat = Literal["float32", "float16", "int8", "fp8", "int4"]
_VECTOR_ROWS = 16  # below it, libraries use matrix-vector kernels, which read each weight once
BYTES_PER_WEIGHT: dict[WeightFormat, float] = {
    "float32": 4.0,
    "float16": 2.0,
    "int8": 1.0,
    "fp8": 1.0,
    "int4": 4.125 / 8,
}
"""INT4 with one float16 scale for 128 weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Peak rates of a device."""

    flops: float
    """Dense FLOPs per second in half precision."""
    bandwidth: float
    """Bytes per second."""
    low_flops: Mapping[WeightFormat, float] = field(default_factory=dict)
    """Dense FLOPs per second with weights and inputs in another format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """Shares of a device's rates that a runtime reaches."""

    plateau: float
    """Share of the peak that a product with very many rows reaches, in any weight format."""
    rows_for_half: float
    """Rows at which a product reaches half of its plateau."""
    attention: float
    """Share of the peak in attention."""
    bandwidth: float
    """Share of the bandwidth."""
    launch_s: float
    """Seconds of an empty kernel."""
    score_passes: float = 0.0
    """Passes of each attention score through memory in float32; 0 if attention is one kernel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Formats:
    """Formats of a bundle's weights, activations and KV caches."""

    layer: WeightFormat = "float16"
    """Linear weights of the decoder."""
    head: WeightFormat = "float16"
    vision: WeightFormat = "float16"
    bytes_per_element: int = 2
    """Bytes of an activation."""
    bytes_per_cached: int = 2
    """Bytes of an element of the KV caches."""
    inputs: frozenset[WeightKind] = frozenset()
    """Kinds of weights whose products have inputs in the same format."""
    outliers: float = 0.0
    """Share of INT4 weights that are stored as activations are, too."""

    def bytes_of(self, kind: WeightFormat) -> float:
        """Return the bytes of a weight."""
        return BYTES_PER_WEIGHT[kind] + (self.outliers * self.bytes_per_element if kind == "int4" else 0.0)

    def of(self, kind: WeightKind) -> WeightFormat:
        """Return the format of one kind of weights."""
        return {"layer": self.layer, "head": self.head, "vision": self.vision}[kind]


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTime:
    """Predicted time of one run of one graph."""

    seconds: float
    compute_seconds: float
    """Time with infinitely fast memory."""
    memory_seconds: float
    """Time with infinitely fast arithmetic."""
    launch_seconds: float

    @property
    def bound(self) -> Literal["compute", "memory", "launch"]:
        """The part that takes the longest."""
        parts: dict[Literal["compute", "memory", "launch"], float] = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "launch": self.launch_seconds,
        }
        return max(parts, key=parts.__getitem__)


def graph_time(work: Work, *, formats: Formats, rates: Rates, efficiency: Efficiency) -> GraphTime:
    """Return the time of one run of a graph by this module's formulas."""
    bandwidth = rates.bandwidth * efficiency.bandwidth
    pairs = [
        (_product_compute(part, formats, rates, efficiency), _product_bytes(part, formats) / bandwidth)
        for part in work.products
    ]
    pairs += [
        (
            part.flops / (rates.flops * efficiency.attention),
            part.moved_bytes(
                bytes_per_element=formats.bytes_per_element, bytes_per_cached=formats.bytes_per_cached
            )
            / bandwidth,
        )
        for part in work.attention
    ]
    elements = sum(part.score_elements for part in work.attention)
    scores = 4.0 * efficiency.score_passes * elements / bandwidth
    rest = work.other_elements * formats.bytes_per_element / bandwidth
    launches = work.launches * efficiency.launch_s
    return GraphTime(
        seconds=sum(max(pair) for pair in pairs) + scores + rest + launches,
        compute_seconds=sum(compute for compute, _ in pairs),
        memory_seconds=sum(memory for _, memory in pairs) + scores + rest,
        launch_seconds=launches,
    )


def _product_compute(part: Product, formats: Formats, rates: Rates, efficiency: Efficiency) -> float:
    share = efficiency.plateau
    if part.rows >= _VECTOR_ROWS:
        share *= part.rows / (part.rows + efficiency.rows_for_half)
    peak = rates.flops
    if part.weights != "none" and part.weights in formats.inputs:
        peak = rates.low_flops[formats.of(part.weights)]
    return part.flops / (peak * share)


def _product_bytes(part: Product, formats: Formats) -> float:
    matrix: float = formats.bytes_per_element
    if part.weights != "none":
        matrix = formats.bytes_of(formats.of(part.weights))
    return part.matrix_elements * matrix + part.row_elements * formats.bytes_per_element


UNFUSED_SCORE_PASSES = 2.0
"""Passes if attention is several kernels: a score is written, normalized in place and read, in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Relative errors."""

    median: float
    nine_in_ten: float
    """Nine of ten errors are smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """Efficiencies of tuned runtimes on one kind of device."""

    efficiency: Efficiency
    num_figures: int
    """Number of published times in the fit."""
    new_model: Errors
    """Error of a figure without the figures of its model in the fit."""
    new_runtime: Errors
    """Error of a figure without the figures of its runtime in the fit, which has none of this runtime."""
    devices: tuple[str, ...]
    """Devices in the fit; predictions for others of the kind are not validated."""

    def sentence(self, device: str) -> str:
        """Return the known error of predictions for ``device`` in words."""
        text = (
            f"{self.num_figures} published times of other runtimes are predicted with a median error of"
            f" {self.new_runtime.median:.0%}, nine in ten within {self.new_runtime.nine_in_ten:.0%}, without any time of"
            f" their runtime ({self.new_model.median:.0%} and {self.new_model.nine_in_ten:.0%} without any of their model)"
        )
        if device not in self.devices:
            text += f"; none of them is of {device}"
        return text


FITTED = msgspec.json.decode(Path(__file__).with_name("fitted.json").read_bytes(), type=dict[str, Fitted])
"""By the first part of a device's name. ``benchmarks/predict_validation.py`` fits them and prints each figure's error; a test
compares its result with these figures."""


def fitted_for(device: DeviceSpec) -> Fitted:
    """Return the efficiencies for the device's kind."""
    return FITTED[device.name.split("-")[0]]


def rates_of(device: DeviceSpec) -> Rates:
    """Return the device's peak rates."""
    low: dict[WeightFormat, float] = {"int8": device.int8_ops}
    if device.fp8_flops is not None:
        low["fp8"] = device.fp8_flops
    return Rates(flops=device.fp16_flops, low_flops=low, bandwidth=device.bandwidth_bytes_per_s)
