"""One backend's checks, in a process of their own: a crash ends only these.

It appends the result of each check to a file, one line of JSON, as soon as the check has ended: a crash loses none.
"""

from __future__ import annotations

import gc
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import msgspec

from trio_edge.profiling.check.answers import (
    LOGITS_ATOL,
    AnswerRecord,
    CheckQuestion,
    answer,
    close_difference,
    exact_difference,
    largest_difference,
)
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes, resident_bytes
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import BackendError, TrioEdgeError
from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.devices.cuda import CudaDevice, cuda_problem, load_cuda
from trio_edge.runtime.devices.machine import find_host
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, build_engines, plan_build
from trio_edge.runtime.engines.files import open_engines
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, EngineBackend, load_tensorrt
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CHECKS = (ANSWERS, CUDA_GRAPH, LOADS) = ("answers", "CUDA graph", "load and close")
"""The checks in their order; building engines comes before them."""
WARM_UP = 2
"""Loads before memory is compared, because libraries allocate at the first ones."""
CYCLES = 8
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


class CheckResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """One check of one backend."""

    backend: str
    check: str
    status: Status
    text: str
    """The result, or the reason why there is none."""
    answers: list[AnswerRecord] = []
    """The bundle's answers, where these were checked."""


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
            questions = job.questions or [_fitting_question(pipeline)]
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
    except TrioEdgeError as error:
        yield result(check, "fail", str(error))


def _planned(bundle: Bundle, job: WorkerJob) -> BuildPlan | None:
    """Return the plan of the engines to build, or None if they are there; raises BackendError if they cannot run here."""
    backend = cast("EngineBackend", job.backend)
    if job.build:
        return plan_build(bundle, BuildOptions(backend=backend))
    open_engines(bundle, backend=backend, version=load_tensorrt(backend).version, host=find_host())
    return None


def _fitting_question(pipeline: Pipeline) -> CheckQuestion:
    largest = measured_sizes(pipeline)[0]
    return CheckQuestion(largest.width, largest.height, PROMPT)


def _grown(bundle: Bundle, job: WorkerJob) -> dict[str, int]:
    """Return the growth of memory over ``job.cycles`` loads, in bytes."""
    before: dict[str, int] = {}
    for cycle in range(WARM_UP + job.cycles):
        if cycle == WARM_UP:
            before = memory_in_use()
        with Pipeline(bundle, make_backend(job.backend)) as pipeline:
            _ = pipeline.generate(None, PROMPT, max_new_tokens=3).text
    return {name: now - before[name] for name, now in memory_in_use().items()}


def memory_in_use() -> dict[str, int]:
    """Return the bytes of resident host memory and, if there is a GPU, minus the free bytes of GPU memory.

    Only differences of the GPU's values have a meaning.
    """
    gc.collect()
    found = {"host": resident_bytes() or 0}
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
