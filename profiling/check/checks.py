"""The checks of ``trio-check``: each backend runs in its own process, and each of its checks gives one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import msgspec

from trio_edge.profiling.check.answers import (
    LOGITS_ATOL,
    AnswerRecord,
    CheckQuestion,
    close_difference,
    exact_difference,
    largest_difference,
)
from trio_edge.profiling.check.worker import WorkerJob, WorkerStep
from trio_edge.runtime.backends.registry import BACKENDS
from trio_edge.runtime.devices.machine import cuda_problem
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, is_installed

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.backends.interface import OnnxRuntimeName

CPU = "onnxruntime"
ORDER = (CPU, *(name for name in BACKENDS if name != CPU))
"""The CPU is first, because other backends are compared with it where no results are stored."""
MOST_GROWN = 32_000_000
"""Bytes that host or GPU memory may grow over all loads: less than eight times the packaged model's weights."""
_LIMIT_SECONDS = 1800
"""Limit per backend, to end a hang; building engines on a small Jetson takes minutes."""
# a file in the working directory must not pass for a package
_ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}

Status = Literal["pass", "fail", "not here"]
Compare = Callable[[AnswerRecord, AnswerRecord], str | None]


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """One check of one backend."""

    backend: str
    check: str
    status: Status
    text: str
    """The result, or the reason why there is none."""


class BackendOutcome(NamedTuple):
    """The report of one backend's process."""

    steps: dict[str, WorkerStep]
    failure: str | None
    """Reason why it ended before its last step."""


def absent_reason(backend: str) -> str | None:
    """Return the reason why a backend cannot run on this machine; None if it can."""
    for engine_backend in ENGINE_BACKENDS:
        if backend == engine_backend and not is_installed(engine_backend):
            return "not installed"
    if backend not in ENGINE_BACKENDS:
        if find_spec("onnxruntime") is None:
            return 'not installed; pip install "trio-edge[ort]"'
        from trio_edge.runtime.backends.onnxruntime import has_provider

        if not has_provider(cast("OnnxRuntimeName", backend)):
            return "the installed onnxruntime lacks this provider"
    return None if backend == CPU else cuda_problem()


def run_backend(job: WorkerJob, folder: Path) -> BackendOutcome:
    """Run ``job`` in its own process, with its files in ``folder``, and return its report."""
    task, report, log = (folder / f"{job.backend}.{end}" for end in ("job", "report", "log"))
    task.write_bytes(msgspec.json.encode(job))
    command = [sys.executable, "-m", "trio_edge.profiling.check.worker", str(task), str(report)]
    with log.open("wb") as output:  # TensorRT also writes to both streams directly
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, timeout=_LIMIT_SECONDS, check=False, env=_ENVIRONMENT
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    lines = report.read_bytes().splitlines() if report.exists() else []
    steps = {step.step: step for step in (msgspec.json.decode(line, type=WorkerStep) for line in lines)}
    return BackendOutcome(steps, _failure(steps, code, log))


def _failure(steps: dict[str, WorkerStep], code: int | None, log: Path) -> str | None:
    if "error" in steps:
        return steps["error"].text
    if code is None:
        return f"no end after {_LIMIT_SECONDS} s"
    if code == 0:
        return None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    return f"its process {ended}: {(lines or ['it printed nothing'])[-1][:300]}"


def judge(
    backend: str, outcome: BackendOutcome, *, expected: Sequence[AnswerRecord], expected_from: str
) -> list[CheckResult]:
    """Return the results of a backend's checks.

    Args:
        backend: Its name.
        outcome: Its process's report.
        expected: Answers to compare with; empty for the first backend.
        expected_from: The backend that gave them; "" for stored answers, from which only rounding may differ.
    """
    steps, failure = outcome
    if (absent := steps.get("absent")) is not None:
        return [CheckResult(backend=backend, check="answers", status="not here", text=absent.text)]
    results = []

    def add(check: str, status: Status, text: str) -> None:
        results.append(CheckResult(backend=backend, check=check, status=status, text=text))

    if "engines" in steps:
        add("engines", "pass", f"built in {steps['engines'].seconds:.0f} s")
    if "answers" not in steps:
        add("answers", "fail", failure or "it reported none")
        return results
    answers = steps["answers"].answers
    add("answers", *_judge_answers(answers, expected, expected_from))
    if backend not in ENGINE_BACKENDS:
        add("CUDA graph", "not here", "only engines of trio-build are captured")
    elif "plain" not in steps:
        add("CUDA graph", "fail", failure or "it reported none")
    else:
        add("CUDA graph", *_judge_plain(steps["plain"].answers, steps["answers"]))
    if "cycles" in steps:
        add("load and close", *_judge_growth(steps["cycles"].grown))
    elif "plain" in steps or backend not in ENGINE_BACKENDS:
        add("load and close", "fail", failure or "it reported nothing")
    return results


def _judge_answers(
    answers: Sequence[AnswerRecord], expected: Sequence[AnswerRecord], expected_from: str
) -> tuple[Status, str]:
    if not expected:
        return "pass", f"{_text_of(answers)}; the other backends are compared with it"
    compare: Compare = close_difference if expected_from else exact_difference
    reference = expected_from or "stored results"
    if (difference := _first_difference(answers, expected, compare)) is not None:
        return "fail", f"differs from {reference}: {difference}"
    logits = f"logits within {largest_difference(answers, expected):.2g}"
    if expected_from:
        return "pass", f"as {reference}: {_text_of(answers)}, {logits}"
    return (
        "pass",
        f"{_text_of(answers)}: kept tokens and answers as stored, {logits} ({LOGITS_ATOL:g} allowed)",
    )


def _judge_plain(plain: Sequence[AnswerRecord], captured: WorkerStep) -> tuple[Status, str]:
    if refused := [note for note in captured.notes if "CUDA graph" in note]:
        return "fail", refused[0]
    if (difference := _first_difference(captured.answers, plain, exact_difference)) is not None:
        return "fail", f"differs from the answers without one: {difference}"
    return (
        "pass",
        f"same answers without one, logits within {largest_difference(captured.answers, plain):.2g}",
    )


def _judge_growth(grown: dict[str, int]) -> tuple[Status, str]:
    text = ", ".join(f"{name} {count / 1e6:+.1f} MB" for name, count in grown.items())
    allowed = f"after repeated loads ({MOST_GROWN / 1e6:.0f} allowed)"
    return "pass" if max(grown.values()) <= MOST_GROWN else "fail", f"{text} {allowed}"


def _first_difference(
    got: Sequence[AnswerRecord], expected: Sequence[AnswerRecord], compare: Compare
) -> str | None:
    if len(got) != len(expected):
        return f"{len(got)} answers for {len(expected)} questions"
    for one, other in zip(got, expected):
        if (difference := compare(one, other)) is not None:
            return f"{one.prompt!r}: {difference}"
    return None


def _text_of(answers: Sequence[AnswerRecord]) -> str:
    return f"{len(answers)} question{'s' if len(answers) > 1 else ''}"


def check_backends(
    bundle: Path,
    folder: Path,
    *,
    questions: Sequence[CheckQuestion],
    stored: Sequence[AnswerRecord],
    starting: Callable[[str], None] = lambda _name: None,
    done: Callable[[CheckResult], None] = lambda _result: None,
) -> list[CheckResult]:
    """Check every backend and return all results.

    Args:
        bundle: The bundle; engines are built into it if there are ``stored`` answers.
        folder: For temporary files.
        questions: Questions to ask; empty for one question that fits the bundle.
        stored: Answers to compare with; empty to compare with the first backend that answers.
        starting: Called with each backend before it runs.
        done: Called with each result.
    """
    results: list[CheckResult] = []
    expected, expected_from = list(stored), ""
    for backend in ORDER:
        if (reason := absent_reason(backend)) is not None:
            found = [CheckResult(backend=backend, check="answers", status="not here", text=reason)]
        else:
            starting(backend)
            job = WorkerJob(
                bundle=str(bundle), backend=backend, questions=list(questions), build=bool(stored)
            )
            outcome = run_backend(job, folder)
            found = judge(backend, outcome, expected=expected, expected_from=expected_from)
            if not expected and "answers" in outcome.steps:
                expected, expected_from = outcome.steps["answers"].answers, backend
        for result in found:
            done(result)
        results += found
    return results
