"""A torch model that computes, for a while, with the weights and inputs that a quantized bundle has."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from trio_edge.calibration.quantization.products import products_of
from trio_edge.calibration.quantization.sections import block_of, quantized_sections
from trio_edge.export.quantize.numerics import quantize, rounded_activations

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from trio_edge.calibration.quantization.sections import Section
    from trio_edge.calibration.schedules.torch_model import TorchModel
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Schedule


@contextmanager
def quantized_model(
    model: TorchModel, schedule: Schedule, plan: QuantizePlan, scales: CalibratedScales, *, dtype: FloatType
) -> Iterator[None]:
    """Let ``model`` compute as the bundle does; a second copy of its quantized weights is in memory meanwhile.

    A probe reads the rounded weights of its layer and of the head where it has their format, as its graph does, else the original
    ones.

    Args:
        model: Is as it was afterwards.
        schedule: The bundle's.
        plan: The bundle's.
        scales: Calibrated.
        dtype: The bundle's.
    """
    names = model.tensor_names()
    with ExitStack() as stack:
        for section in quantized_sections(model, schedule, plan):
            rounded = _rounded_parameters(section, scales, names=names, dtype=dtype)
            always = plan.of_part("select") == section.kind
            stack.enter_context(_exchanged(section.module, rounded, always=always))
            ranges = {
                parameter: partial(
                    rounded_activations, largest=scales.activation_max[names[parameter]], kind=section.kind
                )
                for parameter in section.module.parameters()
                if names[parameter] in scales.activation_max
            }
            stack.enter_context(products_of(section.module, ranges))
        yield


def _rounded_parameters(
    section: Section, scales: CalibratedScales, *, names: Mapping[nn.Parameter, str], dtype: FloatType
) -> dict[nn.Parameter, Tensor]:
    """Return the values of those parameters of a section that differ in the bundle."""
    blocks = {
        linear.get_parameter("weight"): block_of(group) if section.kind == "int4" else None
        for group in section.groups
        for linear in group.linears
    }
    result = {}
    for parameter in section.module.parameters():
        smoothing = scales.smoothing.get(names[parameter])
        values = parameter.detach() if smoothing is None else smoothing.apply(parameter.detach())
        if parameter in blocks:
            rounded = quantize(values, kind=section.kind, dtype=dtype, block=blocks[parameter])
            values = rounded.dequantized()
        if smoothing is not None or parameter in blocks:
            result[parameter] = values.to(parameter.dtype)
    return result


@contextmanager
def _exchanged(module: nn.Module, values: dict[nn.Parameter, Tensor], *, always: bool) -> Iterator[None]:
    """Give parameters other ``values`` while ``module`` runs, or ``always``."""
    own = {parameter: parameter.data for parameter in values}

    def take(tensors: dict[nn.Parameter, Tensor]) -> None:
        for parameter, tensor in tensors.items():
            parameter.data = tensor

    handles = []
    if always:
        take(values)
    else:
        handles = [
            module.register_forward_pre_hook(lambda *_: take(values)),
            module.register_forward_hook(lambda *_: take(own)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        take(own)
