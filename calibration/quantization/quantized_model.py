"""A torch model that computes, for a while, with the weights and inputs that a quantized bundle has."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.quantization.products import products_of
from trio_edge.calibration.quantization.sections import block_of, quantized_sections
from trio_edge.export.quantize.numerics import quantize, rounded_activations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch
    from torch import Tensor, nn

    from trio_edge.calibration.quantization.sections import Section
    from trio_edge.calibration.schedules.torch_model import TorchModel
    from trio_edge.export.quantize.numerics import QuantizedWeight
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Schedule


@contextmanager
def quantized_model(
    model: TorchModel, schedule: Schedule, plan: QuantizePlan, scales: CalibratedScales, *, dtype: FloatType
) -> Iterator[None]:
    """Let ``model`` compute as the bundle does; a byte for each of its quantized weights is in memory meanwhile.

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
    probed = [model.head, *(model.parts.layers[stage.layer] for stage in schedule.stages)]
    with ExitStack() as stack:
        for section in quantized_sections(model, schedule, plan):
            rounded = _rounded_parameters(section, scales, names=names, dtype=dtype)
            always = plan.of_part("select") == section.kind and section.module in probed
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
) -> dict[nn.Parameter, Callable[[], Tensor]]:
    """Return what gives the values of those parameters of a section that differ in the bundle."""
    blocks = {
        linear.get_parameter("weight"): block_of(group) if section.kind == "int4" else None
        for group in section.groups
        for linear in group.linears
    }
    result: dict[nn.Parameter, Callable[[], Tensor]] = {}
    for parameter in section.module.parameters():
        smoothing = scales.smoothing.get(names[parameter])
        values = parameter.detach() if smoothing is None else smoothing.apply(parameter.detach())
        if parameter in blocks:
            rounded = quantize(values, kind=section.kind, dtype=dtype, block=blocks[parameter])
            result[parameter] = partial(_written_out, rounded, parameter.dtype)
        elif smoothing is not None:
            result[parameter] = partial(values.to, parameter.dtype)
    return result


def _written_out(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantized().to(dtype)


@contextmanager
def _exchanged(
    module: nn.Module, values: Mapping[nn.Parameter, Callable[[], Tensor]], *, always: bool
) -> Iterator[None]:
    """Give parameters other ``values`` while ``module`` runs, or ``always``."""
    own = {parameter: parameter.data for parameter in values}

    def take(*_: Any) -> None:
        for parameter, value in values.items():
            parameter.data = value()

    def give_back(*_: Any) -> None:
        for parameter, tensor in own.items():
            parameter.data = tensor

    handles = []
    if always:
        take()
    else:
        handles = [module.register_forward_pre_hook(take), module.register_forward_hook(give_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        give_back()
