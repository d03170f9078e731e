"""One backend's part of ``trio-check``, in its own process: a crash ends only this backend's checks.

The process writes one line of JSON after each step, so that the last line shows how far it came:

    start     free memory of the GPU
    engines   seconds to build them, if they were built
    answers   the bundle's answers
    plain     the same answers without a CUDA graph, if the backend uses one
    cycles    growth of host and GPU memory over repeated loads, in bytes
    absent    reason why nothing can run here
    error     the error, in one line
"""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from trio_edge.profiling.check.answers import AnswerRecord, CheckQuestion, answer
from trio_edge.profiling.measure.measuring import PROMPT, measured_sizes, resident_bytes
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.errors import BackendError, TrioEdgeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.devices.cuda import CudaDevice, load_cuda
from trio_edge.runtime.devices.machine import cuda_problem, find_host
from trio_edge.runtime.engines.build import BuildOptions, build_engines, plan_build
from trio_edge.runtime.engines.files import open_engines
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, EngineBackend, load_tensorrt
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_edge.runtime.bundle.reader import Bundle

WARM_UP = 2
"""Loads before memory is compared, because libraries allocate at the first ones."""
CYCLES = 8


class WorkerJob(msgspec.Struct, frozen=True, kw_only=True):
    """The task of one process."""

    bundle: str
    backend: str
    questions: list[CheckQuestion]
    """Empty for one question about an image that fits the bundle."""
    build: bool
    """Whether to build engines if the backend needs them; otherwise the bundle must have them."""
    cycles: int = CYCLES


class WorkerStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a process's report."""

    step: str
    text: str = ""
    seconds: float = 0.0
    answers: list[AnswerRecord] = []
    notes: list[str] = []
    grown: dict[str, int] = {}
    """Bytes by "host" and "GPU"."""
    gpu_free_bytes: int | None = None


def run_worker(job: WorkerJob, report: Callable[[WorkerStep], None]) -> None:
    """Check one backend, and report each step."""
    try:
        bundle = open_bundle(Path(job.bundle))
        if not _prepare(bundle, job, report):
            return
        _answer(bundle, job, report)
        report(WorkerStep(step="cycles", grown=_grown(bundle, job)))
    except TrioEdgeError as error:
        report(WorkerStep(step="error", text=str(error)))


def memory_in_use() -> dict[str, int]:
    """Return the bytes of resident host memory and, if there is a GPU, minus the free bytes of GPU memory.

    Only differences of the GPU's values have a meaning.
    """
    gc.collect()
    found = {"host": resident_bytes() or 0}
    if cuda_problem() is None:
        found["GPU"] = -(_gpu_free_bytes() or 0)
    return found


def _gpu_free_bytes() -> int | None:
    device = CudaDevice(load_cuda())
    try:
        return device.free_bytes()
    finally:
        device.close()


def _prepare(bundle: Bundle, job: WorkerJob, report: Callable[[WorkerStep], None]) -> bool:
    """Build or find engines; if the backend cannot run here, report that and return False."""
    if job.backend != "onnxruntime":
        report(WorkerStep(step="start", gpu_free_bytes=_gpu_free_bytes()))
    for backend in ENGINE_BACKENDS:
        if job.backend == backend:
            return _has_engines(bundle, backend, job, report)
    return True


def _has_engines(
    bundle: Bundle, backend: EngineBackend, job: WorkerJob, report: Callable[[WorkerStep], None]
) -> bool:
    try:
        if not job.build:
            open_engines(bundle, backend=backend, version=load_tensorrt(backend).version, host=find_host())
            return True
        plan = plan_build(bundle, BuildOptions(backend=backend))
    except BackendError as error:
        report(WorkerStep(step="absent", text=str(error)))
        return False
    start = time.perf_counter()
    build_engines(plan)
    report(WorkerStep(step="engines", seconds=time.perf_counter() - start))
    return True


def _answer(bundle: Bundle, job: WorkerJob, report: Callable[[WorkerStep], None]) -> None:
    with Pipeline(bundle, make_backend(job.backend)) as pipeline:
        questions = job.questions or [_fitting_question(pipeline)]
        answers = answer(pipeline, questions)
        report(WorkerStep(step="answers", answers=answers, notes=list(pipeline.notes)))
    if job.backend in ENGINE_BACKENDS:
        with Pipeline(bundle, make_backend(job.backend, cuda_graph=False)) as pipeline:
            report(WorkerStep(step="plain", answers=answer(pipeline, questions)))


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


def main(argv: list[str]) -> int:
    """Run the job in the file ``argv[0]`` and write its report to the file ``argv[1]``."""
    job = msgspec.json.decode(Path(argv[0]).read_bytes(), type=WorkerJob)
    with Path(argv[1]).open("ab", buffering=0) as file:  # unbuffered: a crash must not lose finished steps

        def report(step: WorkerStep) -> None:
            file.write(msgspec.json.encode(step) + b"\n")

        run_worker(job, report)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
