"""Divergence of a schedule with quantized weights and KV caches from keep-all in floating point, on samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.search.measure.measuring import divergence, keep_all

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.measure.measuring import MeasuredSchedule
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CalibratedScales
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.bundle.schedule import Schedule


def measure_quantized(
    model: TorchModel,
    questions: Sequence[Question],
    schedule: Schedule,
    plan: QuantizePlan,
    scales: CalibratedScales,
    *,
    dtype: FloatType,
    probes: Probes,
    num_tokens: int,
    on_sample: Callable[[], None],
) -> list[MeasuredSchedule]:
    """Return for each question how the quantized model under ``schedule`` changes keep-all's answer.

    Args:
        model: In floating point; is as it was afterwards.
        questions: Samples.
        schedule: The bundle's.
        plan: The bundle's.
        scales: Calibrated.
        dtype: The bundle's.
        probes: The model's.
        num_tokens: Answer tokens that are compared, at most.
        on_sample: Called after every sample.

    Raises:
        DataError: If a sample cannot be asked.
    """
    with torch.inference_mode():
        wholes = []
        for question in questions:
            whole = keep_all(model, make_prompt(model, question), probes=probes, num_tokens=num_tokens)
            wholes.append((whole.tokens, whole.log_probs_TV))  # without what entered every layer
        results = []
        with quantized_model(model, schedule, plan, scales, dtype=dtype):
            for question, (tokens, log_probs_TV) in zip(questions, wholes):
                prompt = make_prompt(model, question)  # its image is encoded by the quantized vision graph
                answer = greedy_answer(
                    model,
                    prompt,
                    schedule,
                    probes=probes,
                    max_tokens=len(tokens),
                    given=tokens,
                    caches=scales.cache_max,
                )
                rounds = max(answer.rounds, default=0)
                results.append(divergence(log_probs_TV, tokens, answer.logits_TV, rounds=rounds))
                on_sample()
    return results
