"""Calibrates a quantization: finds for each group of linear layers the smoothing factors with the least error.

Factors that do not lower the error are not used. Groups are independent: dividing a row of a weight by a factor divides that
row's scales too, so its integers stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.quantize.collecting import answer_samples, listening_to_caches, listening_to_inputs
from trio_edge.calibration.quantize.report import CacheReport, GroupError, QuantizationReport
from trio_edge.calibration.quantize.rounding import GroupRounding, modelopt
from trio_edge.calibration.quantize.sections import quantized_sections
from trio_edge.export.graphs.state_layers import is_linear
from trio_edge.export.quantize.scales import NO_CACHE, CalibratedScales, Smoothing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.quantize.collecting import Inputs
    from trio_edge.calibration.quantize.report import Method
    from trio_edge.calibration.quantize.sections import Section
    from trio_edge.calibration.questions import Sample
    from trio_edge.export.graphs.linear_groups import LinearGroup
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule

_METHODS: dict[frozenset[str], Method] = {
    frozenset(): "round-to-nearest",
    frozenset({"int4"}): "awq",
    frozenset({"int8"}): "smoothquant",
    frozenset({"int4", "int8"}): "awq+smoothquant",
}
"""By the formats that need factors."""


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """Factors and ranges from a calibration, with its report."""

    scales: CalibratedScales
    report: QuantizationReport


def calibrate_quantization(
    model: TorchModel,
    questions: Sequence[Sample],
    schedule: Schedule,
    plan: QuantizePlan,
    *,
    dtype: FloatType,
    num_tokens: int,
    progress: StepProgress = SILENT,
) -> Quantized | None:
    """Return factors and ranges for ``plan``; None if it quantizes only select graphs or the embedding table.

    Inputs are collected while ``questions`` are answered under ``schedule``, with at most ``num_tokens`` tokens each.
    The samples of the second step of ``progress`` are groups.

    Raises:
        DataError: If a sample cannot be asked.
        CheckpointError: If the plan needs factors, and Model Optimizer is not installed.
    """
    sections = quantized_sections(model, schedule, plan)
    if not sections and not plan.has_cache:
        return None
    searched = frozenset(section.kind for section in sections) - {"fp8"}
    if searched:
        modelopt()
    progress.step("collecting the layers' inputs", len(questions))
    layers: tuple[Any, ...] = model.parts.layers
    with (
        listening_to_caches(layers if plan.has_cache else ()) as cached,
        listening_to_inputs(sections, num_samples=len(questions)) as collected,
    ):
        answer_samples(model, questions, schedule, num_tokens=num_tokens, progress=progress)
    if sections:
        progress.step("quantizing layer by layer", sum(len(section.groups) for section in sections))
    names = model.tensor_names()
    search = _Search(names, dtype, plan.outliers, progress)
    for section, inputs in zip(sections, collected):
        search.add(section, inputs)
    caches = tuple(
        NO_CACHE
        if is_linear(layer)
        else rows.range_of(search.smoothing.get(names[layer.self_attn.v_proj.weight]))
        for layer, rows in zip(layers, cached)
    )
    method = _METHODS[searched]
    return Quantized(
        scales=CalibratedScales(
            smoothing=search.smoothing,
            activation_max=search.ranges,
            outliers=search.outliers,
            cache_max=caches,
            method=method,
            num_samples=len(questions),
        ),
        report=QuantizationReport(
            method=method,
            samples=len(questions),
            errors=search.errors,
            caches=[
                CacheReport(layer=layer, key_max=one.key, value_max=one.value)
                for layer, one in enumerate(caches)
            ],
        ),
    )


class _Search:
    """Factors, ranges and errors found so far."""

    def __init__(
        self, names: Mapping[nn.Parameter, str], dtype: FloatType, share: float, progress: StepProgress
    ) -> None:
        self._names, self._dtype, self._share, self._progress = names, dtype, share, progress
        self.smoothing: dict[str, Smoothing] = {}
        self.ranges: dict[str, float] = {}
        self.outliers: dict[str, Tensor] = {}
        self.errors: list[GroupError] = []

    def add(self, section: Section, inputs: list[Inputs]) -> None:
        """Search all groups of a section; empties ``inputs`` to free their memory."""
        found: list[tuple[LinearGroup, Tensor]] = []
        for group in section.groups:
            factors_I = self._group(section, group, inputs.pop(0))
            if factors_I is not None:
                found.append((group, factors_I))
            self._progress.sample()
        self.smoothing |= smoothing_of(found, names=self._names)

    def _group(self, section: Section, group: LinearGroup, inputs: Inputs) -> Tensor | None:
        """Return the best factors, and note ranges, outliers and errors."""
        rounding = GroupRounding.of(
            group, inputs.all_rows(), kind=section.kind, dtype=self._dtype, outliers=self._share
        )
        weights = [self._names[linear.get_parameter("weight")] for linear in group.linears]
        if rounding.columns_K is not None:
            self.outliers |= dict.fromkeys(weights, rounding.columns_K)
        best, error = rounding.best(rounding.candidates() if group.can_smooth else [])
        self.errors.append(
            GroupError(
                part=section.part,
                layer=group.layer,
                group=group.name,
                format=section.kind,
                rounded=rounding.error(None, with_activations=False),
                calibrated=error,
                moved=best is not None,
            )
        )
        if section.kind != "int4":
            largest = rounding.activation_max(best)
            self.ranges |= dict.fromkeys(weights, largest)
        return best


def smoothing_of(
    found: Iterable[tuple[LinearGroup, Tensor]], *, names: Mapping[nn.Parameter, str]
) -> dict[str, Smoothing]:
    """Return the smoothing of the groups' weights and of the layers before them, by canonical name.

    ``found`` has each group's factors [I], which multiply the columns of its weights.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for group, factors_I in found:
        assert group.before is not None, "factors can move"
        inputs |= {names[linear.get_parameter("weight")]: factors_I for linear in group.linears}
        # the first outputs of a fused layer before the group belong to others
        outputs_O = torch.cat([torch.ones(group.start), factors_I])
        outputs |= {names[parameter]: outputs_O for parameter in group.before.parameters()}
    return {
        name: Smoothing(inputs=inputs.get(name), outputs=outputs.get(name)) for name in (*inputs, *outputs)
    }
