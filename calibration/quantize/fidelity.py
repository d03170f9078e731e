"""Divergence of a schedule with quantized weights and KV caches from keep-all in floating point, on samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.selecting import order_of, saliency
from trio_edge.calibration.model.sequence import (
    advanced,
    answer_logits,
    appended,
    begin,
    no_past,
    run_layer,
    with_kept,
)
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.search.measure.measuring import divergence, keep_all
from trio_edge.export.quantize.numerics import rounded_activations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from trio_edge.calibration.model.prompts import SamplePrompt
    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.sequence import Sequence as Rows
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.measure.measuring import MeasuredSchedule
    from trio_edge.export.quantize.plan import QuantizePlan
    from trio_edge.export.quantize.scales import CacheRange, CalibratedScales
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
                logits_TV, rounds = given_tokens(
                    model, prompt, tokens, schedule, probes=probes, caches=scales.cache_max
                )
                results.append(divergence(log_probs_TV, tokens, logits_TV, rounds=rounds))
                on_sample()
    return results


def given_tokens(
    model: TorchModel,
    prompt: SamplePrompt,
    tokens: list[int],
    schedule: Schedule,
    *,
    probes: Probes,
    caches: tuple[CacheRange, ...],
) -> tuple[Tensor, int]:
    """Return the logits that each of ``tokens`` would be chosen from after those before, and the most NMS rounds.

    Args:
        model: Computes as the bundle, but for its KV caches.
        prompt: Image and question.
        tokens: Of an answer.
        schedule: The bundle's.
        probes: The model's.
        caches: Largest values of each layer's KV cache where it is in INT8; none otherwise.
    """
    sequence = begin(model, prompt)
    for number, token in enumerate(tokens[:-1]):
        row = model.embedding_VD[token][None]
        sequence = sequence.with_answer_row(row, position=prompt.next_position + number)
    layer = rounds = 0
    for stage in schedule.stages:
        sequence = _advanced(model, sequence, range(layer, stage.layer), caches)
        scores_N = saliency(model, probes.of(stage.layer, schedule), sequence)
        order = order_of(sequence, scores_N, threshold=schedule.nms_threshold)
        sequence = with_kept(sequence, order.kept(stage.keep), positions=schedule.positions)
        layer, rounds = stage.layer, max(rounds, order.rounds)
    sequence = _advanced(model, sequence, range(layer, model.num_layers), caches)
    return answer_logits(model, sequence), rounds


def _advanced(model: TorchModel, sequence: Rows, layers: range, caches: tuple[CacheRange, ...]) -> Rows:
    """Return the sequence after ``layers``.

    Args:
        model: The model.
        sequence: A prompt and rows of its answer.
        layers: Which ones.
        caches: Largest values of each layer's INT8 KV cache, which answer rows read the rows before them from; none for one
            in floating point.
    """
    if not caches:
        return advanced(model, sequence, layers)
    for layer in layers:
        sequence = sequence.with_hidden(_with_cache(model, sequence, layer, caches[layer]))
    return sequence


def _with_cache(model: TorchModel, sequence: Rows, layer: int, largest: CacheRange) -> Tensor:
    """Return the hidden states after one layer: of the prompt at once, then of one answer row after the other."""
    num_rows, past, hidden = len(sequence.hidden_SD), no_past(model, sequence.hidden_SD), []
    starts = [0, *range(sequence.prompt_length, num_rows)]
    for start, stop in zip(starts, [*starts[1:], num_rows]):
        rows_SD, positions_AS = sequence.hidden_SD[start:stop], sequence.positions_AS[:, start:stop]
        after, (key, value) = run_layer(model, rows_SD, positions_AS, layer, past=past)
        hidden.append(after)
        # a row sees itself in floating point, and later rows see it as the cache holds it
        key = rounded_activations(key, largest=largest.key)
        value = rounded_activations(value, largest=largest.value)
        past = appended(past, (key, value))
    return torch.cat(hidden)
