"""Measures schedules on samples: what the record has is taken from it, the rest is run, sample by sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import torch

from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.search.measure.measuring import keep_all, measure
from trio_edge.calibration.search.measure.record import MeasuredLine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from trio_edge.calibration.json_lines import ResultFile
    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.measure.measuring import KeepAll, MeasuredSchedule
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
        known: Iterable[MeasuredLine],
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
        self._measured: dict[tuple[int, Schedule], MeasuredSchedule] = {
            (line.index, line.schedule): line.result for line in known
        }
        self._whole: dict[int, KeepAll] = {}
        self._whole_bytes = 0

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
                            MeasuredLine(index=question.index, schedule=schedule, result=result)
                        )
            self._on_sample()
        return {
            schedule: [self._measured[question.index, schedule] for question in questions]
            for schedule in schedules
        }

    def _keep_all(self, question: Question) -> KeepAll:
        if question.index in self._whole:
            return self._whole[question.index]
        prompt = make_prompt(self._model, question)
        whole = keep_all(self._model, prompt, probes=self._probes, num_tokens=self._num_tokens)
        if self._whole_bytes + whole.num_bytes <= KEPT_BYTES:
            self._whole[question.index] = whole
            self._whole_bytes += whole.num_bytes
        return whole
