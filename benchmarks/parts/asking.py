"""The same held-out questions for several bundles, through ``trio-eval``'s code; interrupted runs can be continued."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parts.drawn_questions import SMALL_VLM, questions_for
from rich.console import Console

from trio_edge.calibration.evaluate.answering import AnswerSettings
from trio_edge.calibration.evaluate.runs import answer_runs
from trio_edge.calibration.progress import StepProgress
from trio_edge.calibration.questions import digest_of, read_questions

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
    model: str = "tiny",
    cpu_accuracy: CpuAccuracy = "auto",
) -> list[tuple[RunInfo, dict[int, Outcome]]]:
    """Ask ``count`` questions about drawn images; outcomes are stored below ``out``."""
    questions = read_questions(questions_for(model, count, seed=seed))
    answer_tokens = 24 if model == SMALL_VLM else 8
    settings = AnswerSettings(metric=METRIC, answer_tokens=answer_tokens, cpu_accuracy=cpu_accuracy)
    console = Console(stderr=True)
    return answer_runs(
        runs,
        questions,
        settings,
        data_sha256=digest_of(questions, metric=METRIC),
        folder=out / f"work-{count}-{seed}-{cpu_accuracy}",
        progress=StepProgress(step=lambda label, _questions: console.print(label)),
    ).runs
