"""The checks of ``trio-check``: each backend runs in its own process, and each of its checks gives one line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import msgspec

from trio_edge.profiling.check.worker import ANSWERS, CHECKS, CheckResult, WorkerJob
from trio_edge.runtime.backends.registry import BACKENDS
from trio_edge.runtime.devices.cuda import cuda_problem
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, is_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from trio_edge.profiling.check.answers import AnswerRecord, CheckQuestion
    from trio_edge.runtime.backends.interface import OnnxRuntimeName

CPU = "onnxruntime"
ORDER = (CPU, *(name for name in BACKENDS if name != CPU))
"""The CPU is first, because other backends are compared with it where no results are stored."""
_LIMIT_SECONDS = 1800
"""Limit per backend, to end a hang; building engines on a small Jetson takes minutes."""
# a file in the working directory must not pass for a package
_ENVIRONMENT = {**os.environ, "PYTHONSAFEPATH": "1"}


def check_backends(
    bundle: Path,
    folder: Path,
    *,
    questions: Sequence[CheckQuestion],
    stored: Sequence[AnswerRecord],
    starting: Callable[[str], None] = lambda _name: None,
) -> Iterator[CheckResult]:
    """Check every backend and yield each result.

    Args:
        bundle: The bundle; engines are built into it if there are ``stored`` answers.
        folder: For temporary files.
        questions: Questions to ask; empty for one question that fits the bundle.
        stored: Answers to compare with; empty to compare with the first backend that answers.
        starting: Called with each backend before it runs.
    """
    expected, expected_from = list(stored), ""
    for backend in ORDER:
        if (reason := absent_reason(backend)) is not None:
            yield CheckResult(backend, ANSWERS, "not here", reason)
            continue
        starting(backend)
        job = WorkerJob(
            bundle=str(bundle),
            backend=backend,
            questions=list(questions),
            build=bool(stored),
            expected=expected,
            expected_from=expected_from,
        )
        for result in run_backend(job, folder):
            if result.answers and not expected:
                expected, expected_from = result.answers, backend
            yield result


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


def run_backend(job: WorkerJob, folder: Path) -> list[CheckResult]:
    """Run ``job`` in its own process, with its files in ``folder``, and return its results; a crash is the last one."""
    report, log = folder / f"{job.backend}.report", folder / f"{job.backend}.log"
    command = [sys.executable, "-m", "trio_edge.profiling.check.worker", str(report)]
    failure, task = None, msgspec.json.encode(job)
    with log.open("wb") as output:  # TensorRT also writes to both streams directly
        try:
            code = subprocess.run(
                command,
                input=task,
                stdout=output,
                stderr=output,
                timeout=_LIMIT_SECONDS,
                check=False,
                env=_ENVIRONMENT,
            ).returncode
        except subprocess.TimeoutExpired:
            code, failure = 0, f"no end after {_LIMIT_SECONDS} s"
    if code:
        printed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        failure = f"its process {ended}: {(printed or ['it printed nothing'])[-1][:300]}"
    written = report.read_bytes().splitlines() if report.exists() else []
    results = [msgspec.json.decode(line, type=CheckResult) for line in written]
    missing = [check for check in CHECKS if check not in {result.check for result in results}]
    if failure is not None and missing:
        results.append(CheckResult(job.backend, missing[0], "fail", failure))
    return results
