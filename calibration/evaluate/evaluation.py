"""A whole evaluation: the questions, the answers of every bundle, and the report."""

from __future__ import annotations

import os
import platform
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trio_edge.calibration.evaluate.answering import Settings
from trio_edge.calibration.evaluate.comparison import (
    SCHEMA_VERSION,
    EvaluationConditions,
    EvaluationData,
    EvaluationReport,
    compare,
)
from trio_edge.calibration.evaluate.runs import answer_runs, keys_of, plan_runs
from trio_edge.calibration.metrics import METRICS, check_metric, metric_for
from trio_edge.calibration.questions import (
    SYNTHETIC_SETS,
    digest_of,
    parse_shard,
    read_questions,
    shard_of,
    synthetic_questions,
)
from trio_edge.profiling.measure.machine_info import find_machine, find_versions
from trio_edge.runtime.bundle.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio_edge.calibration.evaluate.runs import Answers, RunKey
    from trio_edge.calibration.questions import Question
    from trio_edge.runtime.engines.cpu import CpuAccuracy

DEFAULT_SYNTHETIC_COUNT = 500


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of ``trio-eval``, under their names."""

    bundles: tuple[Path, ...]
    reference: Path | None
    data: str
    metric: str
    count: int | None
    seed: int
    split: str | None
    suffix: str
    shard: str
    answer_tokens: int
    selections: tuple[str, ...]
    backend: str
    threads: int
    cpu_accuracy: CpuAccuracy
    workers: int
    work: Path | None
    merge: tuple[Path, ...]


def evaluate(
    options: EvaluationOptions,
    *,
    on_start: Callable[[str, int, int], None] = lambda _label, _done, _total: None,
    on_answer: Callable[[], None] = lambda: None,
) -> EvaluationReport:
    """Ask all bundles the same questions and return the report.

    ``on_start`` gets each run's label, its number of answers so far, and the number of questions.

    Raises:
        DataError: If the questions cannot be read, or options contradict each other or a work folder.
        BundleError: If a bundle is broken.
        BackendError: If the backend is not installed, or a worker dies.
    """
    if options.merge and options.work is None:
        raise DataError("--merge: expected --work, the folder to merge into, got none; add --work FOLDER")
    selections = tuple(dict.fromkeys(options.selections))
    runs = plan_runs(options.bundles, reference=options.reference, selections=selections)
    data, questions = _asked(options)
    settings = Settings(
        metric=data.metric,
        answer_tokens=min([options.answer_tokens, *(run.bundle.manifest.max_new_tokens for run in runs)]),
        backend=options.backend,
        threads=options.threads,
        workers=options.workers,
        cpu_accuracy=options.cpu_accuracy,
    )
    keys = keys_of(runs, settings, data_sha256=data.sha256)
    with ExitStack() as stack:
        answers = answer_runs(
            runs,
            keys,
            questions,
            settings,
            folder=options.work
            or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trio-eval-"))),
            merge=options.merge,
            on_start=lambda run, done: on_start(run.info.label, done, len(questions)),
            on_answer=on_answer,
        )
    return _report(data, answers, settings, keys)


def _asked(options: EvaluationOptions) -> tuple[EvaluationData, list[Question]]:
    """Return the data set, and the shard of it that this run asks."""
    shard, num_shards = parse_shard(options.shard)
    is_synthetic = options.data in SYNTHETIC_SETS
    if is_synthetic:
        if options.split is not None or options.suffix:
            raise DataError(f"--split and --suffix: expected a JSON-lines file, got '{options.data}'")
        count = DEFAULT_SYNTHETIC_COUNT if options.count is None else options.count
        questions = synthetic_questions(count, seed=options.seed, name=options.data)
    else:
        path = Path(options.data)
        questions = read_questions(path, split=options.split, suffix=options.suffix, count=options.count)
    # a small synthetic set may have no answers but "yes" and "no", and would be taken for yes-no questions
    automatic = METRICS["exact"] if is_synthetic else metric_for(questions)
    metric = automatic if options.metric == "auto" else METRICS[options.metric]
    check_metric(questions, metric)
    part = shard_of(questions, shard=shard, num_shards=num_shards)
    if not part:
        raise DataError(
            f"--shard {options.shard}: expected at most {len(questions)} shards (questions), got more; use fewer"
        )
    data = EvaluationData(
        name=options.data if is_synthetic else Path(options.data).name,
        sha256=digest_of(questions, metric=metric.name),
        metric=metric.name,
        questions=len(questions),
        compared=0,
        shard=f"{shard}/{num_shards}",
    )
    return data, part


def _report(
    data: EvaluationData, answers: Answers, settings: Settings, keys: Sequence[RunKey]
) -> EvaluationReport:
    runs = compare(answers.runs, metric=settings.metric)
    return EvaluationReport(
        schema_version=SCHEMA_VERSION,
        data=msgspec.structs.replace(data, compared=runs[0].accuracy.questions if runs else 0),
        conditions=EvaluationConditions(
            versions=find_versions(),
            backend=keys[0].backend,
            threads=settings.threads,
            workers=settings.workers,
            answer_tokens=settings.answer_tokens,
            machine={
                "system": platform.system(),
                "architecture": platform.machine(),
                "processor": find_machine().name,
                "cpus": str(os.cpu_count()),
            },
        ),
        runs=runs,
        failures=[
            {"run": label, "where": failure.where, "reason": failure.reason}
            for label, failure in answers.failures
        ],
    )
