"""Measures schedules on samples: what the record has is taken from it, the rest is run, sample by sample.

The record is a file that grows line by line, so that an interrupted calibration goes on where it stopped. Its header
(``RecordKey``) says what was measured; a file about something else is refused.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import msgspec
import torch

from trio_edge.calibration.json_lines import ResultFile, locked_folder, opened_results, read_header
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.search.measure.measuring import MeasuredSchedule, keep_all, measure
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from trio_edge.calibration.model.selecting import Probes
    from trio_edge.calibration.model.torch_model import TorchModel
    from trio_edge.calibration.questions import Question
    from trio_edge.calibration.search.measure.measuring import KeepAll

RECORD_NAME = "measurements.jsonl"
KEPT_BYTES = 1 << 30  # about six samples of LLaVA-1.5-7B in float16
"""Keep-all runs that stay in memory between calls; those beyond it run again."""


class RecordKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a measurement: those of equal keys are interchangeable."""

    model: str
    weights: str
    """Digest of names, sizes and times of the weight files."""
    samples_sha256: str
    answer_tokens: int
    dtype: str
    max_visual: int
    """Largest N of all samples: the probes' form follows from it."""


class MeasuredLine(msgspec.Struct, frozen=True, kw_only=True):
    """One schedule on one sample."""

    index: int
    schedule: Schedule
    result: MeasuredSchedule


@contextmanager
def opened_record(folder: Path, key: RecordKey) -> Iterator[tuple[ResultFile, list[MeasuredLine]]]:
    """Yield the folder's record, to append to, and what it holds already.

    Raises:
        DataError: If it cannot be read or written, is in use, is broken, or is about something else.
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
