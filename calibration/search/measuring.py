"""Divergence of a sample's answer under schedules from keep-all's. Schedules that begin alike share that part of the work.

Keep-all runs once and stores the inputs of every layer. All schedules branch from there: one probe per layer, one order of tokens
per threshold, one kept set per budget, and shared layers run once.

A sample's KL is the mean over its answer's tokens of KL(keep-all || schedule), in nats, where both continue keep-all's tokens.
A sample agrees if each of these tokens is the schedule's likeliest too, so that greedy decoding gives the same answer.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, final

import msgspec
import torch

from trio_edge.calibration.json_lines import ResultFile, locked_folder, opened_results, read_header
from trio_edge.calibration.model.divergence import KeepAll, MeasuredSchedule, divergence, keep_all
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.sequence import advanced, answer_logits, order_of, saliency, with_kept
from trio_edge.calibration.search.schedules.space import stages_of
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from trio_edge.calibration.model.sequence import Sequence
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question


def measure(
    model: TorchModel, whole: KeepAll, schedules: Iterable[Schedule]
) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
    """Yield each distinct schedule with its divergence on the sample, in any order."""
    # sorted, because groupby joins only neighbours
    distinct = sorted(set(schedules), key=lambda schedule: (_settings(schedule), stages_of(schedule)))
    branching = _Branching(model, whole)
    for _, group in groupby(distinct, key=_settings):
        yield from branching.branches(list(group), 0, lambda layer: whole.inputs[layer], rounds=0)


def _settings(schedule: Schedule) -> tuple[object, ...]:
    return schedule.probe_rows, schedule.num_probe_rows, schedule.nms_threshold, schedule.positions


class _Branching:
    """The tree of one sample's schedules with equal settings."""

    def __init__(self, model: TorchModel, whole: KeepAll) -> None:
        self._model, self._whole = model, whole

    def branches(
        self, schedules: list[Schedule], stage: int, at: Callable[[int], Sequence], *, rounds: int
    ) -> Iterator[tuple[Schedule, MeasuredSchedule]]:
        """Yield the results of ``schedules``, which are equal before ``stage``.

        ``at`` returns the sequence that enters a layer; layers must ascend from call to call.
        """
        going_on = [schedule for schedule in schedules if len(schedule.stages) > stage]
        for layer, group in groupby(going_on, key=lambda schedule: schedule.stages[stage].layer):
            alike = list(group)
            entering = at(layer)
            scores_N = saliency(self._model, layer, alike[0], entering)
            order = order_of(entering, scores_N, threshold=alike[0].nms_threshold)
            for keep, branch in groupby(alike, key=lambda schedule: schedule.stages[stage].keep):
                kept = with_kept(entering, order.kept(keep), positions=alike[0].positions)
                onward = self._onward(kept, layer)
                yield from self.branches(list(branch), stage + 1, onward, rounds=max(rounds, order.rounds))
        for schedule in schedules:
            if len(schedule.stages) == stage:
                yield schedule, self._compared(schedule, at, rounds)

    def _onward(self, sequence: Sequence, layer: int) -> Callable[[int], Sequence]:
        """Return a function that returns ``sequence``, at ``layer`` now, as it enters later layers in ascending order."""

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
def opened_record(folder: Path, key: RecordKey) -> Iterator[tuple[ResultFile, list[MeasuredLine]]]:
    """Yield the folder's record, to append to, and its measurements so far.

    Raises:
        DataError: If it cannot be read or written, is in use, is broken, or has another key.
    """
    path = folder / RECORD_NAME
    with locked_folder(folder):
        theirs = read_header(path, RecordKey, what="a record of measurements")
        if theirs is not None and theirs != key:
            names = [name for name in key.__struct_fields__ if getattr(theirs, name) != getattr(key, name)]
            raise DataError(
                f"{path}: expected measurements of this model and these samples, got others"
                f" ({', '.join(names)} differ); choose another --work"
            )
        with opened_results(path, key, MeasuredLine, what="a measurement") as opened:
            yield opened


@final
class Measurements:
    """All measurements of one model on one set of samples."""

    def __init__(
        self,
        model: TorchModel,
        *,
        num_tokens: int,
        record: ResultFile,
        known: Iterable[MeasuredLine],
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with the ``known`` measurements; new ones are appended to ``record``."""
        self._model, self._num_tokens = model, num_tokens
        self._record, self._on_sample = record, on_sample
        self._measured: dict[tuple[int, Schedule], MeasuredSchedule] = {
            (line.index, line.schedule): line.result for line in known
        }
        self._whole: dict[int, KeepAll] = {}
        self._whole_bytes = 0

    def of(
        self, schedules: Collection[Schedule], questions: Collection[Question]
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
            self._on_sample()
        return {
            schedule: [self._measured[question.index, schedule] for question in questions]
            for schedule in schedules
        }

    def most_rounds(self, schedule: Schedule) -> int:
        """Return the most NMS rounds of ``schedule`` on any sample."""
        return max(result.rounds for (_, known), result in self._measured.items() if known == schedule)

    def _keep_all(self, question: Question) -> KeepAll:
        if question.index in self._whole:
            return self._whole[question.index]
        prompt = make_prompt(self._model, question)
        whole = keep_all(self._model, prompt, num_tokens=self._num_tokens)
        if self._whole_bytes + whole.num_bytes <= KEPT_BYTES:
            self._whole[question.index] = whole
            self._whole_bytes += whole.num_bytes
        return whole
