"""Divergence of a sample's answer under schedules from keep-all's; schedules that begin alike share their beginning.

Keep-all runs once and leaves what entered every layer. All schedules then branch from there: one probe per layer, one order
of tokens per threshold, one kept set per budget, and the layers between two stages once for all that go through them.

KL of a sample is the mean over its answer's tokens of KL(keep-all || schedule), in nats, where both see keep-all's own tokens
before; it agrees if every one of these tokens is still the likeliest, which is when greedy decoding gives the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.selecting import order_of, saliency
from trio_edge.calibration.model.sequence import advanced, answer_logits, with_kept
from trio_edge.calibration.search.schedules.space import stages_of
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from trio_edge.calibration.model.prompts import SamplePrompt
    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel


@dataclass(frozen=True, kw_only=True)
class KeepAll:
    """One sample without reduction."""

    inputs: list[Sequence]
    """Rows before each layer, the answer's included."""
    tokens: list[int]
    log_probs_TV: Tensor
    """float64, natural logarithms."""

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        return sum(sequence.hidden_SD.nbytes for sequence in self.inputs) + self.log_probs_TV.nbytes


class MeasuredSchedule(NamedTuple):
    """One schedule on one sample."""

    kl: float
    agrees: bool
    rounds: int
    """Most that a stage's NMS took."""


def keep_all(model: TorchModel, prompt: SamplePrompt, *, probes: Probes, num_tokens: int) -> KeepAll:
    """Return the sample's own answer, up to ``num_tokens`` tokens, and what entered every layer."""
    answer = greedy_answer(model, prompt, Schedule(), probes=probes, max_tokens=num_tokens)
    return KeepAll(inputs=answer.inputs, tokens=answer.tokens, log_probs_TV=_log_probs(answer.logits_TV))


def measure(
    model: TorchModel, whole: KeepAll, schedules: Iterable[Schedule], *, probes: Probes
) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
    """Yield what each schedule does to the sample, in an order of its own; equal ones once."""
    # sorted, schedules that begin alike are neighbours, which groupby needs
    distinct = sorted(set(schedules), key=lambda schedule: (_settings(schedule), stages_of(schedule)))
    branching = _Branching(model, whole, probes)
    for _, group in groupby(distinct, key=_settings):
        yield from branching.from_keep_all(list(group))


def _settings(schedule: Schedule) -> tuple[object, ...]:
    return schedule.probe_rows, schedule.num_probe_rows, schedule.nms_threshold, schedule.positions


class _Branching:
    """One sample's tree of schedules with the same settings."""

    def __init__(self, model: TorchModel, whole: KeepAll, probes: Probes) -> None:
        self._model, self._whole, self._probes = model, whole, probes

    def from_keep_all(self, schedules: list[Schedule]) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
        inputs = self._whole.inputs
        return self._branches(schedules, 0, lambda layer: inputs[layer], rounds=0)

    def _branches(
        self, schedules: list[Schedule], stage: int, at: Callable[[int], Sequence], *, rounds: int
    ) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
        """Yield the schedules, alike up to ``stage``, where ``at`` gives what enters a layer; asked in ascending order."""
        going_on = [schedule for schedule in schedules if len(schedule.stages) > stage]
        for layer, group in groupby(going_on, key=lambda schedule: schedule.stages[stage].layer):
            alike = list(group)
            entering = at(layer)
            scores_N = saliency(self._model, self._probes.of(layer, alike[0]), entering)
            order = order_of(entering, scores_N, threshold=alike[0].nms_threshold)
            for keep, branch in groupby(alike, key=lambda schedule: schedule.stages[stage].keep):
                kept = with_kept(entering, order.kept(keep), positions=alike[0].positions)
                onward = self._onward(kept, layer)
                yield from self._branches(list(branch), stage + 1, onward, rounds=max(rounds, order.rounds))
        for schedule in schedules:
            if len(schedule.stages) == stage:
                yield schedule, self._compared(schedule, at, rounds)

    def _onward(self, sequence: Sequence, layer: int) -> Callable[[int], Sequence]:
        """Return what gives the sequence at later and later layers."""

        def at(wanted: int) -> Sequence:
            nonlocal sequence, layer
            sequence, layer = advanced(self._model, sequence, range(layer, wanted)), wanted
            return sequence

        return at

    def _compared(self, schedule: Schedule, at: Callable[[int], Sequence], rounds: int) -> MeasuredSchedule:
        if not schedule.stages:
            return MeasuredSchedule(0.0, True, 0)
        logits_TV = answer_logits(self._model, at(self._model.num_layers))
        return divergence(self._whole.log_probs_TV, self._whole.tokens, logits_TV, rounds=rounds)


def divergence(log_p_TV: Tensor, tokens: list[int], logits_TV: Tensor, *, rounds: int) -> MeasuredSchedule:
    """Return how logits differ from keep-all's distributions, given its ``tokens``."""
    log_q_TV = _log_probs(logits_TV)
    kl = float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1).mean())
    chosen_T = torch.tensor(tokens, device=log_q_TV.device)
    return MeasuredSchedule(max(kl, 0.0), bool((log_q_TV.argmax(-1) == chosen_T).all()), rounds)


def _log_probs(logits_TV: Tensor) -> Tensor:
    # in float32 a KL of 1e-6 would be rounding
    return torch.log_softmax(logits_TV.to(torch.float64), dim=-1)
