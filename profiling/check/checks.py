"""The checks of ``trio-check``: each backend runs in its own process, and each of its checks gives one line.

A crash ends only the checks of one backend. The process appends the result of each check to a file, one line of JSON, as soon as
the check has ended: a crash loses none.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import time
from collections import deque
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import msgspec
import numpy as np

from trio_edge.profiling.check.answers import (
    LOGITS_ATOL,
    SAFE_ENVIRONMENT,
    AnswerRecord,
    CheckQuestion,
    answer,
    close_difference,
    exact_difference,
    largest_difference,
)
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes
from trio_edge.runtime.backends.registry import BACKENDS, make_backend
from trio_edge.runtime.bundle.errors import BackendError, TrioEdgeError, install_command
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.devices.cuda import CudaDevice, load_cuda
from trio_edge.runtime.devices.machine import cuda_problem, find_host, process_bytes
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, build_engines, plan_build
from trio_edge.runtime.engines.files import open_engines
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, EngineBackend, is_installed, load_tensorrt
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from trio_edge.runtime.backends.interface import OnnxRuntimeName

CPU = "onnxruntime"
ORDER = (CPU, *(name for name in BACKENDS if name != CPU))
"""The CPU is first, because other backends are compared with it where no results are stored."""
_LIMIT_SECONDS = 1800
"""Limit per backend, to end a hang; building engines on a small Jetson takes minutes."""
CHECKS = (ANSWERS, CUDA_GRAPH, LOADS) = ("answers", "CUDA graph", "load and close")
"""The checks in their order; building engines comes before them."""
HOURS = "hours"
"""The check that comes after them, if a time is given."""
WARM_UP = 2
"""Loads before memory is compared, because libraries allocate at the first ones."""
CYCLES = 8
MOST_TIMED = 1000
"""Rounds of answers at the beginning and at the end of the hours whose median times are told."""
NUM_SAMPLES = 240
"""Looks at the memory within the hours."""
MOST_GROWN = 32_000_000
"""Bytes that host or GPU memory may grow over all loads: less than eight times the packaged model's weights."""

Status = Literal["pass", "fail", "not here"]
Verdict = tuple[Status, str]


class WorkerJob(msgspec.Struct, frozen=True, kw_only=True):
    """The task of one process."""

    bundle: str
    backend: str
    questions: list[CheckQuestion]
    """Empty for one question about an image that fits the bundle."""
    build: bool
    """Whether to build engines if the backend needs them; otherwise the bundle must have them."""
    expected: list[AnswerRecord] = []
    """Answers to compare with; empty for the first backend."""
    expected_from: str = ""
    """The backend that gave them; "" for stored answers, from which only rounding may differ."""
    cycles: int = CYCLES
    seconds: float = 0.0
    """Time to answer again and again at the end."""


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """One check of one backend."""

    backend: str
    check: str
    status: Status
    text: str
    """The result, or the reason why there is none."""
    answers: list[AnswerRecord] = []
    """The bundle's answers, where these were checked."""


def check_backends(
    bundle: Path,
    folder: Path,
    *,
    questions: Sequence[CheckQuestion],
    stored: Sequence[AnswerRecord],
    seconds: float = 0.0,
    starting: Callable[[str], None] = lambda _name: None,
) -> Iterator[CheckResult]:
    """Check every backend and yield each result.

    Args:
        bundle: The bundle; engines are built into it if there are ``stored`` answers.
        folder: For temporary files.
        questions: Questions to ask; empty for one question that fits the bundle.
        stored: Answers to compare with; empty to compare with the first backend that answers.
        seconds: Time that each backend answers again and again at the end.
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
            seconds=seconds,
        )
        for result in run_backend(job, folder):
            if result.answers and not expected:
                expected, expected_from = result.answers, backend
            yield result


def absent_reason(backend: str) -> str | None:
    """Return the reason why a backend cannot run on this machine; None if it can."""
    if backend in ENGINE_BACKENDS:
        if not is_installed(backend):
            return "not installed"
    else:
        if find_spec("onnxruntime") is None:
            return f"not installed; {install_command('ort')}"
        from trio_edge.runtime.backends.onnxruntime import has_provider

        if not has_provider(cast("OnnxRuntimeName", backend)):
            return "the installed onnxruntime lacks this provider"
    return None if backend == CPU else cuda_problem()


def run_backend(job: WorkerJob, folder: Path) -> list[CheckResult]:
    """Run ``job`` in its own process, with its files in ``folder``, and return its results; a crash is the last one."""
    report, log = folder / f"{job.backend}.report", folder / f"{job.backend}.log"
    command = [sys.executable, "-m", "trio_edge.profiling.check.checks", str(report)]
    failure, task = None, msgspec.json.encode(job)
    with log.open("wb") as output:  # TensorRT also writes to both streams directly
        try:
            code = subprocess.run(
                command,
                input=task,
                stdout=output,
                stderr=output,
                timeout=_LIMIT_SECONDS + job.seconds,
                check=False,
                env=SAFE_ENVIRONMENT,
            ).returncode
        except subprocess.TimeoutExpired:
            code, failure = 0, f"no end after {_LIMIT_SECONDS + job.seconds:.0f} s"
    if code:
        printed = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        failure = f"its process {ended}: {(printed or ['it printed nothing'])[-1][:300]}"
    written = report.read_bytes().splitlines() if report.exists() else []
    results = [msgspec.json.decode(line, type=CheckResult) for line in written]
    checks = (*CHECKS, HOURS) if job.seconds else CHECKS
    missing = [check for check in checks if check not in {result.check for result in results}]
    if failure is not None and missing:
        results.append(CheckResult(job.backend, missing[0], "fail", failure))
    return results


def run_worker(job: WorkerJob) -> Iterator[CheckResult]:
    """Yield the result of each check of one backend; an error is the result of the check that raised it."""
    result, check = partial(CheckResult, job.backend), ANSWERS
    try:
        bundle, has_engines = open_bundle(Path(job.bundle)), job.backend in ENGINE_BACKENDS
        if has_engines:
            try:
                plan = _planned(bundle, job)
            except BackendError as error:
                yield result(check, "not here", str(error))
                return
            if plan is not None:
                start = time.perf_counter()
                build_engines(plan)
                yield result("engines", "pass", f"built in {time.perf_counter() - start:.0f} s")
        with Pipeline(bundle, make_backend(job.backend)) as pipeline:
            largest = measured_sizes(pipeline)[0]
            questions = job.questions or [CheckQuestion(largest.width, largest.height, PROMPT)]
            answers, notes = answer(pipeline, questions), pipeline.notes
        yield result(check, *_judge_answers(answers, job), answers)
        check = CUDA_GRAPH
        if has_engines:
            with Pipeline(bundle, make_backend(job.backend, cuda_graph=False)) as pipeline:
                plain = answer(pipeline, questions)
            yield result(check, *_judge_plain(plain, answers, notes))
        else:
            yield result(check, "not here", "only engines of trio-build are captured")
        check = LOADS
        yield result(check, *judge_growth(_grown(bundle, job)))
        if job.seconds:
            check = HOURS
            with Pipeline(bundle, make_backend(job.backend)) as pipeline:
                yield result(check, *judge_hours(pipeline, questions, seconds=job.seconds))
    except TrioEdgeError as error:
        yield result(check, "fail", str(error))


def _planned(bundle: Bundle, job: WorkerJob) -> BuildPlan | None:
    """Return the plan of the engines to build, or None if they are there; raises BackendError if they cannot run here."""
    backend = cast("EngineBackend", job.backend)
    if job.build:
        return plan_build(bundle, BuildOptions(backend=backend))
    open_engines(bundle, backend=backend, version=load_tensorrt(backend).version, host=find_host())
    return None


def _grown(bundle: Bundle, job: WorkerJob) -> dict[str, int]:
    """Return the growth of memory over ``job.cycles`` loads, in bytes."""
    before: dict[str, int] = {}
    for cycle in range(WARM_UP + job.cycles):
        if cycle == WARM_UP:
            before = memory_in_use()
        with Pipeline(bundle, make_backend(job.backend)) as pipeline:
            _ = pipeline.generate(None, PROMPT, max_new_tokens=3).text
    return {name: now - before[name] for name, now in memory_in_use().items()}


def judge_hours(pipeline: Pipeline, questions: Sequence[CheckQuestion], *, seconds: float) -> Verdict:
    """Answer again and again; return the verdict on changed answers and on the growth of memory."""
    expected = answer(pipeline, questions)
    first: list[float] = []
    last: deque[float] = deque(maxlen=MOST_TIMED)
    samples: list[tuple[float, dict[str, int]]] = []
    count = num_changed = 0
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < seconds or not count:
        if now >= len(samples) * seconds / NUM_SAMPLES:
            samples.append((now, memory_in_use()))
        begin = time.perf_counter()
        got = answer(pipeline, questions)
        last.append(1e3 * (time.perf_counter() - begin) / len(got))
        if len(first) < MOST_TIMED:
            first.append(last[-1])
        num_changed += sum(exact_difference(*pair) is not None for pair in zip(got, expected))
        count += len(got)
    late = [sample for sample in samples if sample[0] >= seconds / 10] or samples
    times = [3600 / seconds * now for now, _ in late]  # 0 to 3600: polyfit likes small numbers
    grown = {
        name: float(np.polyfit(times, [memory[name] for _, memory in late], 1)[0]) * 3600
        if len(late) > 2
        else 0.0
        for name in samples[0][1]
    }
    growth = ", ".join(
        f"{name} {1e-6 * size * 3600 / seconds:+.2f} MB an hour" for name, size in grown.items()
    )
    medians = f"median {statistics.median(first):.1f} ms, at the end {statistics.median(last):.1f} ms"
    is_right = num_changed == 0 and max(grown.values()) <= MOST_GROWN
    text = f"{count} answers, {num_changed} changed; {medians}; {growth} ({MOST_GROWN / 1e6:.0f} MB in all allowed)"
    return "pass" if is_right else "fail", text


def memory_in_use() -> dict[str, int]:
    """Return the bytes of resident host memory and, if there is a GPU, minus the free bytes of GPU memory.

    Only differences of the GPU's values have a meaning.
    """
    gc.collect()
    found = {"host": process_bytes("VmRSS") or 0}
    if cuda_problem() is None:
        device = CudaDevice(load_cuda())
        try:
            found["GPU"] = -(device.free_bytes() or 0)
        finally:
            device.close()
    return found


def _judge_answers(answers: Sequence[AnswerRecord], job: WorkerJob) -> Verdict:
    asked = f"{len(answers)} question{'s' if len(answers) > 1 else ''}"
    if not job.expected:
        return "pass", f"{asked}; the other backends are compared with it"
    compare = close_difference if job.expected_from else exact_difference
    if (difference := _first_difference(answers, job.expected, compare)) is not None:
        return "fail", f"differs from {job.expected_from or 'stored results'}: {difference}"
    logits = f"logits within {largest_difference(answers, job.expected):.2g}"
    if job.expected_from:
        return "pass", f"as {job.expected_from}: {asked}, {logits}"
    return "pass", f"{asked}: kept tokens and answers as stored, {logits} ({LOGITS_ATOL:g} allowed)"


def _judge_plain(
    plain: Sequence[AnswerRecord], captured: Sequence[AnswerRecord], notes: Sequence[str]
) -> Verdict:
    if refused := [note for note in notes if "CUDA graph" in note]:
        return "fail", refused[0]
    if (difference := _first_difference(captured, plain, exact_difference)) is not None:
        return "fail", f"differs from the answers without one: {difference}"
    return "pass", f"same answers without one, logits within {largest_difference(captured, plain):.2g}"


def judge_growth(grown: dict[str, int]) -> Verdict:
    """Return the verdict on the growth of memory in bytes, by "host" and "GPU"."""
    text = ", ".join(f"{name} {count / 1e6:+.1f} MB" for name, count in grown.items())
    allowed = f"after repeated loads ({MOST_GROWN / 1e6:.0f} allowed)"
    return "pass" if max(grown.values()) <= MOST_GROWN else "fail", f"{text} {allowed}"


def _first_difference(
    got: Sequence[AnswerRecord],
    expected: Sequence[AnswerRecord],
    compare: Callable[[AnswerRecord, AnswerRecord], str | None],
) -> str | None:
    if len(got) != len(expected):
        return f"{len(got)} answers for {len(expected)} questions"
    for one, other in zip(got, expected):
        if (difference := compare(one, other)) is not None:
            return f"{one.prompt!r}: {difference}"
    return None


def main(report_file: str) -> None:
    """Run the job on standard input and append its results to a file."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=WorkerJob)
    with Path(report_file).open("ab", buffering=0) as report:  # unbuffered: a crash must lose no result
        for result in run_worker(job):
            report.write(msgspec.json.encode(result) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
