"""Calibrates a quantization: layer by layer, the factors that lessen the error on collected inputs, and what error is left.

Only decoder layers and their KV caches are calibrated. Weights are rounded as the export is going to do it
(``export/quantize/numerics``), and factors that do not lessen the error are not used. FP8 has no factors: its
numbers are as exact when they are 28000 times smaller, so that large inputs cost the others nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from trio_edge.calibration.quantization.cache_ranges import listening_to_caches
from trio_edge.calibration.quantization.collecting import answer_samples, listening_to_inputs
from trio_edge.calibration.quantization.groups import GROUPS, block_of, can_move, moved, tensor_name
from trio_edge.calibration.quantization.modelopt_search import (
    awq_factors,
    check_modelopt,
    smoothquant_factors,
)
from trio_edge.calibration.quantization.report import CacheReport, GroupError, QuantizationReport
from trio_edge.export.quantize.numerics import quantize, rounded_activations
from trio_edge.export.quantize.scales import CalibratedScales

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from trio_edge.calibration.quantization.collecting import Inputs
    from trio_edge.calibration.quantization.groups import Group, GroupName
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.schedules.selecting import Probes
    from trio_edge.calibration.schedules.torch_model import TorchModel
    from trio_edge.export.quantize.numerics import Format
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import Smoothing
    from trio_edge.runtime.manifest import FloatType, QuantizedFormat
    from trio_edge.runtime.schedule import Schedule

ALPHAS = (0.25, 0.5, 0.75)
"""SmoothQuant's exponents; the best one is taken for every group."""


Method = Literal["round-to-nearest", "awq", "smoothquant", "awq+smoothquant"]
_METHODS: dict[frozenset[str], Method] = {
    frozenset(): "round-to-nearest",
    frozenset({"int4"}): "awq",
    frozenset({"int8"}): "smoothquant",
    frozenset({"int4", "int8"}): "awq+smoothquant",
}
"""By the formats that factors are searched for."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a calibration found."""

    scales: CalibratedScales
    report: QuantizationReport


def calibrate_quantization(
    model: TorchModel,
    questions: Sequence[Question],
    schedule: Schedule,
    plan: QuantizePlan,
    *,
    dtype: FloatType,
    probes: Probes,
    num_tokens: int,
    on_step: Callable[[str, int], None] = lambda _text, _count: None,
    on_one: Callable[[], None] = lambda: None,
) -> Quantized | None:
    """Return factors and ranges for what ``plan`` quantizes of the decoder layers and their KV caches; None if it is nothing.

    Args:
        model: In floating point.
        questions: Samples that inputs are collected from, with token reduction on.
        schedule: The bundle's.
        plan: The format of every part.
        dtype: The bundle's, in which scales are stored.
        probes: The model's.
        num_tokens: Answer tokens of a sample, at most.
        on_step: Called with what begins and how many samples or layers it has.
        on_one: Called after each of them.

    Raises:
        DataError: If a sample cannot be asked.
        CheckpointError: If factors are searched for, and Model Optimizer is not installed.
    """
    formats = plan.of_layers(schedule, num_layers=model.num_layers)
    kinds = set(formats) - {"none"}
    if not kinds and not plan.has_cache:
        return None
    if kinds - {"fp8"}:
        check_modelopt()
    on_step("collecting what enters the layers", len(questions))
    layers = model.parts.layers
    with (
        listening_to_caches(layers if plan.has_cache else ()) as cached,
        listening_to_inputs(layers if kinds else (), num_samples=len(questions)) as collected,
    ):
        answer_samples(model, questions, schedule, probes=probes, num_tokens=num_tokens, on_sample=on_one)
    smoothing: dict[str, Smoothing] = {}
    ranges: dict[str, float] = {}
    errors: list[GroupError] = []
    if kinds:
        on_step("quantizing layer by layer", model.num_layers)
    for layer, inputs in enumerate(collected):
        kind = formats[layer]
        if kind != "none":
            found = _Layer(model, layer, kind, dtype)
            smoothing |= found.search(inputs)
            ranges |= found.ranges
            errors += found.errors
        inputs.clear()
        on_one()
    caches = tuple(rows.range_of(layer, smoothing) for layer, rows in enumerate(cached))
    method = _METHODS[frozenset(kinds - {"fp8"})]
    return Quantized(
        scales=CalibratedScales(
            smoothing=smoothing,
            activation_max=ranges,
            cache_max=caches,
            method=method,
            num_samples=len(questions),
        ),
        report=QuantizationReport(
            method=method,
            samples=len(questions),
            errors=errors,
            caches=[
                CacheReport(layer=layer, key_max=one.key, value_max=one.value)
                for layer, one in enumerate(caches)
            ],
        ),
    )


class _Layer:
    """One decoder layer: its groups are searched one after the other, and do not depend on each other.

    Dividing a row of a weight by a factor divides that row's scales too: the integers stay.
    """

    def __init__(self, model: TorchModel, layer: int, kind: QuantizedFormat, dtype: FloatType) -> None:
        self._model, self._layer, self._kind, self._dtype = model, layer, kind, dtype
        self.ranges: dict[str, float] = {}
        self.errors: list[GroupError] = []

    def search(self, inputs: dict[GroupName, Inputs]) -> dict[str, Smoothing]:
        """Return what is moved, and note ranges and errors."""
        checkpoint = self._model.checkpoint
        factors: dict[GroupName, Tensor] = {}
        for group in GROUPS:
            block = block_of(checkpoint, self._layer, group) if self._kind == "int4" else None
            if self._kind == "int4" and block is None:
                continue  # stays in floating point
            rows_TI = inputs[group.name].all_rows().to("cpu")
            rounding = _Rounding(
                weight_OI=self._weight(group),
                rows_TI=rows_TI,
                kind=self._kind,
                dtype=self._dtype,
                block=block,
            )
            movable = can_move(checkpoint, self._layer, group)
            best, error = rounding.best(rounding.candidates() if movable and self._kind != "fp8" else [])
            self.errors.append(
                GroupError(
                    layer=self._layer,
                    group=group.name,
                    format=self._kind,
                    rounded=rounding.error(None, with_activations=False),
                    calibrated=error,
                    moved=best is not None,
                )
            )
            if best is not None:
                factors[group.name] = best
            if self._kind != "int4":
                largest = rounding.activation_max(best)
                self.ranges |= {tensor_name(self._layer, linear): largest for linear in group.linears}
        return moved(checkpoint, self._layer, factors)

    def _weight(self, group: Group) -> Tensor:
        """Return the weights of a group below each other, float32: one linear layer with the outputs of all."""
        layer = self._model.parts.layers[self._layer]
        weights = [layer.get_submodule(linear).get_parameter("weight") for linear in group.linears]
        return torch.cat([weight.detach().to("cpu", torch.float32) for weight in weights])


@dataclass(frozen=True, kw_only=True)
class _Rounding:
    """One group of linear layers, its inputs, and how it is rounded."""

    weight_OI: Tensor
    rows_TI: Tensor
    """The last row is the largest absolute value of each input over all rows that entered."""
    kind: Format
    dtype: FloatType
    block: int | None

    def candidates(self) -> list[Tensor]:
        """Return factors to try."""
        if self.block is not None:
            return [awq_factors(self.weight_OI, self.rows_TI[:-1], block=self.block)]
        return [smoothquant_factors(self.weight_OI, self.rows_TI, alpha=alpha) for alpha in ALPHAS]

    def best(self, candidates: list[Tensor]) -> tuple[Tensor | None, float]:
        """Return the factors with the least error, None for no factors, and that error."""
        tried = [(factors, self.error(factors, with_activations=True)) for factors in (None, *candidates)]
        return min(tried, key=lambda one: one[1])

    def error(self, factors_I: Tensor | None, *, with_activations: bool) -> float:
        """Return the sum of squared errors of the outputs over the sum of their squares."""
        inputs_TI = self.rows_TI[:-1]
        exact_TO = inputs_TI @ self.weight_OI.T
        weight_OI = self.weight_OI
        if factors_I is not None:
            inputs_TI, weight_OI = inputs_TI / factors_I, weight_OI * factors_I
        if with_activations and self.kind != "int4":
            largest = self.activation_max(factors_I)
            inputs_TI = rounded_activations(inputs_TI, largest=largest, kind=self.kind)
        rounded = quantize(weight_OI, kind=self.kind, dtype=self.dtype, block=self.block)
        wrong_TO = inputs_TI @ rounded.dequantized().to(torch.float32).T - exact_TO
        return float(wrong_TO.square().sum() / exact_TO.square().sum().clamp(min=1e-30))

    def activation_max(self, factors_I: Tensor | None) -> float:
        """Return the largest absolute input after the factors."""
        largest_I = self.rows_TI[-1] if factors_I is None else self.rows_TI[-1] / factors_I
        return float(largest_I.max())
