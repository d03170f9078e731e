"""Divergence of a sample's answer under schedules from keep-all's. Schedules that begin alike share that part of the work.

Keep-all runs once and stores the inputs of every layer. All schedules branch from there: one probe per layer, one order of tokens
per threshold, one kept set per budget, and shared layers run once.

A sample's KL is the mean over its answer's tokens of KL(keep-all || schedule), in nats, where both continue keep-all's tokens.
A sample agrees if each of these tokens is the schedule's likeliest too, so that greedy decoding gives the same answer.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, final

import msgspec
import torch

from trio_edge.calibration.json_lines import opened_results, work_folder
from trio_edge.calibration.model.greedy import KeepAll, MeasuredSchedule, divergence, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import advanced, answer_logits, order_of, saliency, with_kept
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.search.schedules.space import stages_of
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from trio_edge.calibration.json_lines import ResultFile
    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.progress import StepProgress
    from trio_edge.calibration.questions import Sample


def measure(
    model: TorchModel, whole: KeepAll, schedules: Iterable[Schedule]
) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
    """Yield each distinct schedule with its divergence on the sample, in any order."""
    # sorted, because groupby joins only neighbours
    distinct = sorted(set(schedules), key=lambda schedule: (_settings(schedule), stages_of(schedule)))
    for _, group in groupby(distinct, key=_settings):
        yield from _branches(model, whole, list(group), 0, lambda layer: whole.inputs[layer], rounds=0)


def _settings(schedule: Schedule) -> tuple[object, ...]:
    return schedule.probe_rows, schedule.num_probe_rows, schedule.nms_threshold, schedule.positions


def _branches(
    model: TorchModel,
    whole: KeepAll,
    schedules: list[Schedule],
    stage: int,
    at: Callable[[int], Sequence],
    *,
    rounds: int,
) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
    """Yield the results of ``schedules``, which have equal settings and are equal before ``stage``.

    ``at`` returns the sequence that enters a layer; layers must ascend from call to call.
    """
    going_on = [schedule for schedule in schedules if len(schedule.stages) > stage]
    for layer, group in groupby(going_on, key=lambda schedule: schedule.stages[stage].layer):
        alike = list(group)
        entering = at(layer)
        scores_N = saliency(model, layer, alike[0], entering)
        order = order_of(entering, scores_N, threshold=alike[0].nms_threshold)
        for keep, branch in groupby(alike, key=lambda schedule: schedule.stages[stage].keep):
            kept = with_kept(entering, order.kept(keep), positions=alike[0].positions)
            onward, most = _onward(model, kept, layer), max(rounds, order.rounds)
            yield from _branches(model, whole, list(branch), stage + 1, onward, rounds=most)
    for schedule in schedules:
        if not schedule.stages:
            yield schedule, MeasuredSchedule(0.0, True, 0)
        elif len(schedule.stages) == stage:
            logits_TV = answer_logits(model, at(model.num_layers))
            yield schedule, divergence(whole.log_probs_TV, whole.tokens, logits_TV, rounds=rounds)


def _onward(model: TorchModel, sequence: Sequence, layer: int) -> Callable[[int], Sequence]:
    """Return a function that returns ``sequence``, at ``layer`` now, as it enters later layers in ascending order."""

    def at(wanted: int) -> Sequence:
        nonlocal sequence, layer
        sequence, layer = advanced(model, sequence, range(layer, wanted)), wanted
        return sequence

    return at


RECORD_NAME = "measurements.jsonl"
KEPT_BYTES = 1 << 30  # about six samples of LLaVA-1.5-7B in float16
"""Memory for keep-all results between calls; others are computed again."""


class RecordKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a measurement depends on; measurements of equal keys are interchangeable."""

    model: str
    weights: str
    """Digest of names, sizes and times of the weight files."""
    samples_sha256: str
    answer_tokens: int
    dtype: str
    max_visual: int
    """Largest N of all samples, which decides the probes' form."""


class MeasuredLine(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the record."""

    index: int
    schedule: Schedule
    result: MeasuredSchedule


@contextmanager
def opened_measurements(
    model: TorchModel, key: RecordKey, work: Path | None, progress: StepProgress = SILENT
) -> Iterator[Measurements]:
    """Yield the measurements of ``model`` that the folder ``work`` has so far; new ones are stored there.

    Raises:
        DataError: If the folder cannot be read or written, is in use, is broken, or is of another key.
    """
    with (
        work_folder(work) as folder,
        opened_results(folder / RECORD_NAME, key, MeasuredLine, what="a measurement") as (record, known),
    ):
        measured = {(line.index, line.schedule): line.result for line in known}
        yield Measurements(model, key.answer_tokens, record, measured, progress)


@final
@dataclass
class Measurements:
    """All measurements of one model on one set of samples."""

    _model: TorchModel
    _num_tokens: int
    _record: ResultFile
    _measured: dict[tuple[int, Schedule], MeasuredSchedule]
    _progress: StepProgress
    _whole: dict[int, KeepAll] = field(default_factory=dict)
    _whole_bytes: int = 0

    def of(
        self, schedules: Collection[Schedule], questions: Collection[Sample]
    ) -> dict[Schedule, list[MeasuredSchedule]]:
        """Return each schedule's measurements on the questions, in their order; measures the missing ones."""
        for question in questions:
            missing = [item for item in schedules if (question.index, item) not in self._measured]
            if missing:
                with torch.inference_mode():
                    whole = self._keep_all(question)
                    for schedule, result in measure(self._model, whole, missing):
                        self._measured[question.index, schedule] = result
                        self._record.append(
                            MeasuredLine(index=question.index, schedule=schedule, result=result)
                        )
            self._progress.sample()
        return {
            schedule: [self._measured[question.index, schedule] for question in questions]
            for schedule in schedules
        }

    def most_rounds(self, schedule: Schedule) -> int:
        """Return the most NMS rounds of ``schedule`` on any sample."""
        return max(result.rounds for (_, known), result in self._measured.items() if known == schedule)

    def _keep_all(self, question: Sample) -> KeepAll:
        if question.index in self._whole:
            return self._whole[question.index]
        prompt = make_prompt(self._model, question)
        whole = keep_all(self._model, prompt, num_tokens=self._num_tokens)
        if self._whole_bytes + whole.num_bytes <= KEPT_BYTES:
            self._whole[question.index] = whole
            self._whole_bytes += whole.num_bytes
        return whole
