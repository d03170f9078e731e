"""A torch model whose decoder layers compute, for a while, with the weights and inputs that a quantized bundle has."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.quantization.groups import GROUPS, block_of, tensor_name
from trio_edge.export.quantize.numerics import quantize, rounded_activations

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from trio_edge.calibration.schedules.torch_model import TorchModel
    from trio_edge.export.quantize.numerics import Format
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.manifest import FloatType
    from trio_edge.runtime.schedule import Schedule


@contextmanager
def quantized_layers(
    model: TorchModel, schedule: Schedule, plan: QuantizePlan, scales: CalibratedScales, *, dtype: FloatType
) -> Iterator[None]:
    """Let the decoder layers of ``model`` compute as in the bundle; a second copy of their weights is in memory meanwhile.

    A probe in front of a layer reads the rounded weights where it has the layer's format, as its graph does, else the original
    ones.

    Args:
        model: Is as it was afterwards.
        schedule: The bundle's.
        plan: The bundle's.
        scales: Calibrated.
        dtype: The bundle's.
    """
    formats = plan.of_layers(schedule, num_layers=model.num_layers)
    with ExitStack() as stack:
        for index, kind in enumerate(formats):
            if kind != "none":
                rounded = _rounded_parameters(model, index, kind, scales, dtype)
                always = plan.of_part("select") == kind
                stack.enter_context(_exchanged(model.parts.layers[index], rounded, always=always))
                stack.enter_context(_rounded_inputs(model.parts.layers[index], index, kind, scales))
        yield


def _rounded_parameters(
    model: TorchModel, index: int, kind: Format, scales: CalibratedScales, dtype: FloatType
) -> dict[str, Tensor]:
    """Return those parameters of a layer that differ in the bundle, by their names in it."""
    blocks = {
        f"{linear}.weight": block_of(model.checkpoint, index, group) if kind == "int4" else None
        for group in GROUPS
        for linear in group.linears
    }
    result = {}
    for name, parameter in model.parts.layers[index].named_parameters():
        module, _, leaf = name.rpartition(".")
        smoothing = scales.smoothing.get(tensor_name(index, module, "bias" if leaf == "bias" else "weight"))
        values = parameter.detach() if smoothing is None else smoothing.apply(parameter.detach())
        if name in blocks and not (kind == "int4" and blocks[name] is None):
            values = quantize(values, kind=kind, dtype=dtype, block=blocks[name]).dequantized()
        if values is not parameter:
            result[name] = values.to(parameter.dtype)
    return result


@contextmanager
def _exchanged(layer: nn.Module, values: dict[str, Tensor], *, always: bool) -> Iterator[None]:
    """Give ``layer`` other values of its parameters while it runs, or ``always``."""
    own = {name: layer.get_parameter(name).data for name in values}

    def take(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            layer.get_parameter(name).data = tensor

    handles = []
    if always:
        take(values)
    else:
        handles = [
            layer.register_forward_pre_hook(lambda *_: take(values)),
            layer.register_forward_hook(lambda *_: take(own)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        take(own)


@contextmanager
def _rounded_inputs(layer: nn.Module, index: int, kind: Format, scales: CalibratedScales) -> Iterator[None]:
    """Round the inputs of the linear layers that have a range to ``kind`` while ``layer`` runs."""

    def rounding(largest: float) -> Callable[[nn.Module, Any], Any]:
        return lambda _module, values: (
            rounded_activations(values[0], largest=largest, kind=kind),
            *values[1:],
        )

    ranges = {
        linear: scales.activation_max.get(tensor_name(index, linear))
        for group in GROUPS
        for linear in group.linears
    }
    handles = [
        layer.get_submodule(linear).register_forward_pre_hook(rounding(largest))
        for linear, largest in ranges.items()
        if largest is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
