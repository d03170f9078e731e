"""A torch model that computes with the rounded weights and inputs of a quantized bundle, within a context."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.greedy import divergence, greedy_answer, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.quantize.collecting import products_of
from trio_edge.calibration.quantize.sections import block_of, quantized_sections
from trio_edge.export.quantize.numerics import quantize_weight, rounded_activations
from trio_edge.export.quantize.plan import PARTS, QuantizePlan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.trio.methods import stage_method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from trio_edge.calibration.model.greedy import MeasuredSchedule
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.quantize.sections import Section
    from trio_edge.calibration.questions import Sample
    from trio_edge.export.quantize.numerics import QuantizedWeight
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule

    Values = Mapping[nn.Parameter, Callable[[], Tensor]]
    """Functions that compute a parameter's other value."""


@contextmanager
def quantized_model(
    model: TorchModel, schedule: Schedule, plan: QuantizePlan, scales: CalibratedScales, *, dtype: FloatType
) -> Iterator[None]:
    """Let ``model`` compute as the bundle does; this takes one byte of memory for each quantized weight.

    TRIO's probes share the weights of their layer and the head. Other selections have their layer's in the format of select
    graphs, rounded to nearest where that differs.
    """
    names = model.tensor_names()
    rounded = partial(_rounded_parameters, names=names, dtype=dtype)
    shares = stage_method(schedule.method).has_probe
    in_probes = plan if shares else QuantizePlan(formats=dict.fromkeys(PARTS, plan.of_part("select")))
    own = {section.module: section for section in quantized_sections(model, schedule, plan)}
    probes = {section.module: section for section in quantized_sections(model, schedule, in_probes)}
    probed = [model.head, *(model.parts.layers[stage.layer] for stage in schedule.stages)]
    with ExitStack() as stack:
        for module in dict.fromkeys((*own, *probed)):
            section, probe = own.get(module), probes.get(module)
            inside = rounded(section, scales)
            outside: Values = {}
            # a probe uses the layer's weights while the layer itself does not run
            if module in probed:
                is_shared = (section and section.kind) == (probe and probe.kind)
                outside = inside if is_shared else rounded(probe, CalibratedScales())
            stack.enter_context(_exchanged(module, inside=inside, outside=outside))
            if section is not None:
                stack.enter_context(products_of(module, _rounded_inputs(section, scales, names=names)))
        for stage in schedule.stages if shares else ():
            section = own.get(model.parts.layers[stage.layer])
            if section is not None:
                probe_module = model.probe(stage.layer, schedule)
                probe_module.is_quantized = True
                stack.callback(setattr, probe_module, "is_quantized", False)
                stack.enter_context(products_of(probe_module, _rounded_inputs(section, scales, names=names)))
        yield


def _rounded_parameters(
    section: Section | None,
    scales: CalibratedScales,
    *,
    names: Mapping[nn.Parameter, str],
    dtype: FloatType,
) -> Values:
    """Return the values of a section's parameters that quantization and smoothing change."""
    if section is None:
        return {}
    blocks = {
        linear.get_parameter("weight"): block_of(group) if section.kind == "int4" else None
        for group in section.groups
        for linear in group.linears
    }
    result: dict[nn.Parameter, Callable[[], Tensor]] = {}
    for parameter in section.module.parameters():
        factors = scales.smoothing.get(names[parameter])
        values = parameter.detach() if factors is None else factors.apply(parameter.detach())
        if parameter in blocks:
            rounded = quantize_weight(
                values,
                kind=section.kind,
                dtype=dtype,
                block=blocks[parameter],
                columns_K=scales.outliers.get(names[parameter]) if section.kind == "int4" else None,
            )
            result[parameter] = partial(_dequantized, rounded, parameter.dtype)
        elif factors is not None:
            result[parameter] = partial(values.to, parameter.dtype)
    return result


def _rounded_inputs(
    section: Section, scales: CalibratedScales, *, names: Mapping[nn.Parameter, str]
) -> dict[nn.Parameter, Callable[[Tensor], Tensor]]:
    """Return for the weights of a section whose inputs are rounded the function that rounds them."""
    return {
        parameter: partial(
            rounded_activations, largest=scales.activation_max[names[parameter]], kind=section.kind
        )
        for parameter in section.module.parameters()
        if names[parameter] in scales.activation_max
    }


def _dequantized(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return weight.dequantized().to(dtype)


@contextmanager
def _exchanged(module: nn.Module, *, inside: Values, outside: Values) -> Iterator[None]:
    """Give parameters the values of ``inside`` while ``module`` runs, and those of ``outside`` otherwise."""
    own = {parameter: parameter.data for parameter in (*inside, *outside)}

    def take(values: Values) -> None:
        for parameter, tensor in own.items():
            parameter.data = values[parameter]() if parameter in values else tensor

    with ExitStack() as stack:
        stack.callback(take, {})
        take(outside)
        if inside is not outside:
            for handle in (
                module.register_forward_pre_hook(lambda *_: take(inside)),
                module.register_forward_hook(lambda *_: take(outside)),
            ):
                stack.callback(handle.remove)
        yield


def measure_quantized(
    model: TorchModel,
    questions: Sequence[Sample],
    schedule: Schedule,
    plan: QuantizePlan,
    scales: CalibratedScales,
    *,
    dtype: FloatType,
    num_tokens: int,
    progress: StepProgress = SILENT,
) -> list[MeasuredSchedule]:
    """Return for each question the divergence of the quantized model under ``schedule`` from keep-all."""
    with torch.inference_mode():
        wholes = []
        for question in questions:
            whole = keep_all(model, make_prompt(model, question), num_tokens=num_tokens)
            wholes.append((whole.tokens, whole.log_probs_TV))  # not the large inputs of every layer
        results = []
        with quantized_model(model, schedule, plan, scales, dtype=dtype):
            for question, (tokens, log_probs_TV) in zip(questions, wholes):
                prompt = make_prompt(model, question)  # again, with the quantized vision graph
                answer = greedy_answer(
                    model, prompt, schedule, max_tokens=len(tokens), given=tokens, caches=scales.cache_max
                )
                rounds = max(answer.rounds, default=0)
                results.append(divergence(log_probs_TV, tokens, answer.logits_TV, rounds=rounds))
                progress.sample()
    return results
