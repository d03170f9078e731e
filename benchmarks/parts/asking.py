"""The same held-out questions for several bundles, through ``trio-eval``'s code; interrupted runs can be continued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from trio_edge.calibration.evaluate.answering import Settings
from trio_edge.calibration.evaluate.runs import answer_runs, keys_of
from trio_edge.calibration.questions import digest_of, synthetic_questions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trio_edge.calibration.evaluate.answering import Outcome
    from trio_edge.calibration.evaluate.runs import Run, RunInfo
    from trio_edge.runtime.engines.cpu import CpuAccuracy

METRIC = "exact"


def answers_of(
    runs: Sequence[Run],
    *,
    count: int,
    seed: int,
    out: Path,
    workers: int = 1,
    cpu_accuracy: CpuAccuracy = "auto",
) -> list[tuple[RunInfo, dict[int, Outcome]]]:
    """Ask ``count`` synthetic questions; outcomes are stored below ``out``."""
    questions = synthetic_questions(count, seed=seed)
    settings = Settings(metric=METRIC, workers=workers, answer_tokens=8, cpu_accuracy=cpu_accuracy)
    console = Console(stderr=True)
    return answer_runs(
        runs,
        keys_of(runs, settings, data_sha256=digest_of(questions, metric=METRIC)),
        questions,
        settings,
        folder=out / f"work-{count}-{seed}-{cpu_accuracy}",
        on_start=lambda run, _done: console.print(run.info.label),
    ).runs
