"""Measures schedules on samples: what the record has is taken from it, the rest is run, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.search.measure.importance import importance
from trio_edge.calibration.search.measure.measuring import MeasuredSchedule, keep_all, measure
from trio_edge.calibration.search.measure.record import ImportanceLine, MeasuredLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio_edge.calibration.json_lines import ResultFile
    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.measure.importance import LayerImportance
    from trio_edge.calibration.search.measure.measuring import KeepAll
    from trio_edge.calibration.search.measure.record import Line
    from trio_edge.runtime.bundle.schedule import Schedule

KEPT_BYTES = 1 << 30  # about six samples of LLaVA-1.5-7B in float16
"""Keep-all runs that stay in memory between calls; those beyond it run again."""


@final
class Measurements:
    """All that was measured of one model on one set of samples."""

    def __init__(
        self,
        model: TorchModel,
        *,
        probes: Probes,
        num_tokens: int,
        record: ResultFile,
        known: Iterable[Line],
        on_sample: Callable[[], None] = lambda: None,
    ) -> None:
        """Take over what the record holds.

        Args:
            model: To run.
            probes: Its probes.
            num_tokens: Answer tokens that are compared, at most.
            record: Receives what is measured.
            known: What it holds already.
            on_sample: Called after every sample of every call.
        """
        self._model, self._probes, self._num_tokens = model, probes, num_tokens
        self._record, self._on_sample = record, on_sample
        self._measured: dict[tuple[int, Schedule], MeasuredSchedule] = {}
        self._importance: dict[int, list[LayerImportance]] = {}
        self._whole: dict[int, KeepAll] = {}
        self._whole_bytes = 0
        for line in known:
            if isinstance(line, MeasuredLine):
                self._measured[line.index, line.schedule] = MeasuredSchedule(
                    line.kl, line.agrees, line.rounds
                )
            else:
                self._importance[line.index] = line.layers

    def of(
        self, schedules: Sequence[Schedule], questions: Sequence[Question]
    ) -> dict[Schedule, list[MeasuredSchedule]]:
        """Return what each schedule does to each of the questions, in their order.

        Raises:
            DataError: If a sample cannot be asked.
        """
        for question in questions:
            missing = [item for item in schedules if (question.index, item) not in self._measured]
            if missing:
                with torch.inference_mode():
                    whole = self._keep_all(question)
                    for schedule, result in measure(self._model, whole, missing, probes=self._probes):
                        self._measured[question.index, schedule] = result
                        self._record.append(
                            MeasuredLine(index=question.index, schedule=schedule, **result._asdict())
                        )
            self._on_sample()
        return {
            schedule: [self._measured[question.index, schedule] for question in questions]
            for schedule in schedules
        }

    def importance(self, questions: Sequence[Question]) -> list[list[LayerImportance]]:
        """Return the importance of every layer's visual tokens for each of the questions."""
        for question in questions:
            if question.index not in self._importance:
                with torch.inference_mode():
                    layers = importance(self._model, self._keep_all(question), probes=self._probes)
                self._importance[question.index] = layers
                self._record.append(ImportanceLine(index=question.index, layers=layers))
            self._on_sample()
        return [self._importance[question.index] for question in questions]

    def _keep_all(self, question: Question) -> KeepAll:
        if question.index in self._whole:
            return self._whole[question.index]
        prompt = make_prompt(self._model, question)
        whole = keep_all(self._model, prompt, probes=self._probes, num_tokens=self._num_tokens)
        if self._whole_bytes + whole.num_bytes <= KEPT_BYTES:
            self._whole[question.index] = whole
            self._whole_bytes += whole.num_bytes
        return whole
