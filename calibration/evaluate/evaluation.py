"""A whole evaluation: the questions, the answers of every bundle, and the report."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trio_edge.calibration.evaluate.answering import AnswerSettings
from trio_edge.calibration.evaluate.comparison import (
    SCHEMA_VERSION,
    EvaluationConditions,
    EvaluationData,
    EvaluationReport,
    compare,
)
from trio_edge.calibration.evaluate.decisions import with_options
from trio_edge.calibration.evaluate.runs import answer_runs, backend_of, plan_runs
from trio_edge.calibration.metrics import METRICS, check_metric, metric_for
from trio_edge.calibration.progress import SILENT
from trio_edge.calibration.questions import digest_of, read_questions
from trio_edge.profiling.measure.machine_info import find_machine, find_versions
from trio_edge.runtime.bundle.errors import DataError, printable

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.calibration.progress import StepProgress


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(AnswerSettings):
    """The options of ``trio-eval``, under their names."""

    bundles: tuple[Path, ...]
    reference: Path | None
    data: Path
    count: int | None
    split: str | None
    suffix: str
    selections: tuple[str, ...]
    work: Path | None


def evaluate(options: EvaluationOptions, progress: StepProgress = SILENT) -> EvaluationReport:
    """Ask all bundles the same questions and return the report; each run is a step of ``progress``.

    Raises:
        DataError: If the questions cannot be read, or options contradict each other or a work folder.
        BundleError: If a bundle is broken.
        BackendError: If the backend is not installed.
    """
    selections = tuple(dict.fromkeys(options.selections))
    runs = plan_runs(options.bundles, reference=options.reference, selections=selections)
    lines: dict[str, Any] = {name: getattr(options, name) for name in ("split", "suffix", "count")}
    questions = read_questions(options.data, videos=not options.decide, **lines)
    if options.decide:
        odd = {"base-tile-first", "wrong-image"} & {*selections}
        given = [*odd, *(f"--{name}" for name in ("suffix", "system") if getattr(options, name))]
        if given:
            raise DataError(
                f"--decide: expected neither --suffix, --system nor such a --selection, got {given[0]}; drop it"
            )
        questions = with_options(questions)
    metric = metric_for(questions) if options.metric == "auto" else METRICS[options.metric]
    check_metric(questions, metric)
    room = min(run.bundle.manifest.max_new_tokens for run in runs)
    settings = replace(options, metric=metric.name, answer_tokens=min(options.answer_tokens, room))
    data_sha256 = digest_of(questions, metric=metric.name)
    answers = answer_runs(
        runs, questions, settings, data_sha256=data_sha256, folder=options.work, progress=progress
    )
    reports = compare(answers.runs, metric=metric.name)
    return EvaluationReport(
        schema_version=SCHEMA_VERSION,
        data=EvaluationData(
            name=printable(options.data.name),
            sha256=data_sha256,
            metric=metric.name,
            questions=len(questions),
            compared=reports[0].accuracy.questions if reports else 0,
        ),
        conditions=EvaluationConditions(
            versions=find_versions(),
            backend=backend_of(runs[0], settings),
            threads=settings.threads,
            answer_tokens=settings.answer_tokens,
            machine={
                "system": platform.system(),
                "architecture": platform.machine(),
                "processor": find_machine().name,
                "cpus": str(os.cpu_count()),
            },
        ),
        runs=reports,
        failures=answers.failures,
    )
