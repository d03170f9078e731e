"""Greedy answers of the torch model under a schedule, and how far they are from keep-all's.

Each layer caches keys and values of the rows that entered it. The position of a new row is the layer's number of rows
("compact") or follows the whole prompt ("preserved"), as in the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from trio_edge.calibration.model.sequence import appended, logits_of, order_of, run_layer, saliency, with_kept
from trio_edge.export.quantize.numerics import rounded_activations
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from trio_edge.calibration.model.sequence import KeysAndValues, Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.export.quantize.scales import CacheRange


@dataclass(frozen=True, kw_only=True)
class Greedy:
    """One answer."""

    tokens: list[int]
    """A stop token ends them."""
    logits_TV: Tensor
    """float32, the logits of each token."""
    inputs: list[Sequence]
    """Hidden states before each layer: the prompt, and all answer tokens but the last."""
    kept: list[Tensor]
    """The image's visual tokens that are left after each stage, ascending."""
    rounds: list[int]
    """NMS rounds of each stage."""


def greedy_answer(
    model: TorchModel,
    prompt: Sequence,
    schedule: Schedule,
    *,
    max_tokens: int,
    given: list[int] | None = None,
    caches: tuple[CacheRange, ...] = (),
    score: Callable[[TorchModel, int, Schedule, Sequence], Tensor] = saliency,
) -> Greedy:
    """Return the answer's first ``max_tokens`` tokens.

    The answer is ``given``, as many tokens, or the likeliest ones. ``caches`` has the ranges of INT8 KV caches, one per layer.
    ``score`` ranks the tokens of a stage, before the NMS.
    """
    stages = {stage.layer: stage.keep for stage in schedule.stages}
    sequence = prompt
    inputs: list[Sequence] = []
    past: list[KeysAndValues] = []
    kept, rounds = [], []
    for layer in range(model.num_layers):
        if layer in stages:
            scores_N = score(model, layer, schedule, sequence)
            order = order_of(sequence, scores_N, threshold=schedule.nms_threshold)
            sequence = with_kept(sequence, order.kept(stages[layer]), positions=schedule.positions)
            kept.append(sequence.original_N)
            rounds.append(order.rounds)
        inputs.append(sequence)
        rows, present = run_layer(
            model, sequence.hidden_SD, sequence.positions_AS, layer, as_cached=_rounding(layer, caches)
        )
        past.append(present)
        sequence = sequence.after(layer, rows)
    logits = [logits_of(model, sequence.hidden_SD[-1:])]
    tokens = [int(logits[0].argmax()) if given is None else given[0]]
    while len(tokens) < max_tokens and tokens[-1] not in model.text.stop_token_ids:
        preserved = prompt.next_position + len(tokens) - 1
        is_compact = schedule.positions == "compact" and bool(schedule.stages)
        row = model.embedding_VD[tokens[-1]][None]
        for layer, entering in enumerate(inputs):
            position = len(entering.hidden_SD) if is_compact else preserved
            inputs[layer] = entering.with_answer_row(row, position=position)
            positions, rounding = inputs[layer].positions_AS[:, -1:], _rounding(layer, caches)
            row, new = run_layer(model, row, positions, layer, past=past[layer], as_cached=rounding)
            past[layer] = appended(model, layer, past[layer], new)
        logits.append(logits_of(model, row))
        tokens.append(int(logits[-1].argmax()) if given is None else given[len(tokens)])
    return Greedy(tokens=tokens, logits_TV=torch.cat(logits), inputs=inputs, kept=kept, rounds=rounds)


def _rounding(layer: int, caches: tuple[CacheRange, ...]) -> Callable[[Tensor, Tensor], KeysAndValues] | None:
    """Return what rounds keys and values as INT8 KV caches do; None without ``caches``."""
    if not caches:
        return None
    largest = caches[layer]
    return lambda key, value: (
        rounded_activations(key, largest=largest.key),
        rounded_activations(value, largest=largest.value),
    )


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """One sample without reduction."""

    inputs: list[Sequence]
    """Rows before each layer, prompt and answer."""
    tokens: list[int]
    log_probs_TV: Tensor
    """float64, in nats."""

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(sequence.hidden_SD.nbytes for sequence in self.inputs) + self.log_probs_TV.nbytes


class MeasuredSchedule(NamedTuple):
    """One schedule on one sample."""

    kl: float
    agrees: bool
    rounds: int


def keep_all(model: TorchModel, prompt: Sequence, *, num_tokens: int) -> KeepAll:
    """Return keep-all's answer of at most ``num_tokens`` tokens, and the inputs of every layer."""
    answer = greedy_answer(model, prompt, Schedule(), max_tokens=num_tokens)
    return KeepAll(inputs=answer.inputs, tokens=answer.tokens, log_probs_TV=_log_probs(answer.logits_TV))


def divergence(log_p_TV: Tensor, tokens: list[int], logits_TV: Tensor, *, rounds: int) -> MeasuredSchedule:
    """Return the divergence of logits from keep-all's log probabilities ``log_p_TV``, and agreement with its ``tokens``."""
    log_q_TV = _log_probs(logits_TV)
    kl = float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean())
    chosen_T = torch.tensor(tokens, device=log_q_TV.device)
    return MeasuredSchedule(max(kl, 0.0), bool((log_q_TV.argmax(-1) == chosen_T).all()), rounds)


def _log_probs(logits_TV: Tensor) -> Tensor:
    # in float32, rounding gives a KL of 1e-6
    return torch.log_softmax(logits_TV.to(torch.float64), dim=-1)
