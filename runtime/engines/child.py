"""Builds one graph's engine in a separate process, so that all its memory returns to the system.

The process reports to its parent with dictionaries over a pipe, each with a "kind".

    phase, step    TensorRT's progress: name and number of steps; name and step
    error          text: the first error of TensorRT or of the build
    done           num_bytes, sha256, seconds, peak_memory_bytes
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.graph_io import CANDIDATE_ROWS, OUTPUT_GRADIENT
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.devices.machine import process_bytes
from trio_edge.runtime.engines.files import TIMING_CACHE_NAME
from trio_edge.runtime.engines.package import EngineBackend, TensorRT, load_tensorrt, make_logger
from trio_edge.runtime.engines.passes import (
    Network,
    join_attention,
    separate_products,
    split_lm_head,
    split_sliced_products,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile

LOG_NAME = "build.log"
_STEP_SECONDS = 0.1  # between reports of steps, of which TensorRT takes thousands
_PARENT_DIED = 1  # PR_SET_PDEATHSIG
_OOM_SCORE = Path("/proc/self/oom_score_adj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The description of one build, which is sent to the process."""

    backend: EngineBackend
    spec: GraphSpec
    graph_file: Path
    folder: Path
    """Gets the engine, the log and the timing cache."""
    compute_capabilities: tuple[int, ...]
    """GPUs to build for ahead of time; empty for this machine's GPU."""
    detailed_layers: bool
    dtype: str
    """The bundle's dtype."""
    split_lm_head: int
    """Number of blocks of the lm_head; 1 leaves it whole."""
    lm_head_shape: tuple[int, int]
    """[vocabulary size, hidden size]."""
    advice: str = ""
    """End of the message if TensorRT fails."""

    @property
    def engine_file(self) -> Path:
        """File of the engine."""
        return self.folder / f"{self.spec.name}.engine"


def run_job(job: Job, reports: Connection) -> None:
    """Build the engine of ``job`` and report the result; the entry point of the process."""
    _follow_parent()
    with (job.folder / LOG_NAME).open("wb") as log:  # TensorRT also writes to both streams directly
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    reporter = Reporter(reports)
    try:
        build_engine(job, reporter)
    except BackendError as error:
        reporter.error(str(error))
    except OSError as error:
        reporter.error(f"cannot write {job.engine_file.name} ({error.strerror})")
    except MemoryError:
        reporter.error("out of memory")
    reports.close()


class Reporter:
    """The child's end of the pipe. Only the first error is reported, because later ones follow from it."""

    def __init__(self, reports: Connection) -> None:
        self._reports = reports
        self._has_error = False

    def send(self, **report: Any) -> None:
        """Send one report; end the process if the parent has ended."""
        try:
            self._reports.send(report)
        except OSError:
            os._exit(1)

    def error(self, text: str) -> None:
        """Send ``text`` unless an error was sent before."""
        if not self._has_error:
            self._has_error = True
            self.send(kind="error", text=" ".join(text.split()))


def build_engine(job: Job, reporter: Reporter) -> None:
    """Write the engine of one graph with all its profiles.

    Raises:
        BackendError: If TensorRT is missing or does not take the graph.
        OSError: If the file cannot be written.
    """
    start = time.perf_counter()
    tensorrt = load_tensorrt(job.backend)
    trt = tensorrt.module
    logger = make_logger(trt, reporter.error)
    builder = _not_none(trt.Builder(logger), "builder")
    # The flag of a strongly typed network; newer releases have no other networks and need no flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(definition, logger)
    if not parser.parse_from_file(str(job.graph_file)):
        reason = parser.get_error(0).desc() if parser.num_errors else "no reason given"
        raise BackendError(f"its parser does not take {job.graph_file.name}: {reason}")
    network = Network(tensorrt, definition)  # keeps the passes' constants alive while the engine is built
    _run_passes(job, network)
    config = _config(job, tensorrt, builder, reporter)
    num_bytes, digest = write_engine(tensorrt, builder, definition, config, job.engine_file)
    if tensorrt.has_timing_cache:
        write_timing_cache(config, job.folder / TIMING_CACHE_NAME)
    reporter.send(
        kind="done",
        num_bytes=num_bytes,
        sha256=digest,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=process_bytes("VmHWM"),
    )


def holds_head(spec: GraphSpec) -> bool:
    """Return whether a graph has products with the lm_head."""
    has_gradient = any(tensor.name == OUTPUT_GRADIENT for tensor in spec.outputs)
    return spec.role == "head" or (has_gradient and CANDIDATE_ROWS not in spec.input_names)


def _run_passes(job: Job, network: Network) -> None:
    join_attention(network)
    rows = {profile.sizes.get("S", 0) for profile in job.spec.profiles}
    if 1 in rows and len(rows) > 1:
        split_sliced_products(network)
        separate_products(network)
    if job.split_lm_head > 1 and holds_head(job.spec):
        vocab_size, hidden_size = job.lm_head_shape
        split_lm_head(network, vocab_size=vocab_size, hidden_size=hidden_size, num_blocks=job.split_lm_head)


def _config(job: Job, tensorrt: TensorRT, builder: Any, reporter: Reporter) -> Any:
    trt, config = tensorrt.module, builder.create_builder_config()
    for profile in job.spec.profiles:
        config.add_optimization_profile(optimization_profile(builder, job.spec, profile))
    set_flags(config, trt, dtype=job.dtype)
    if job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for index, capability in enumerate(job.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)
    if job.detailed_layers:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _progress_monitor(trt, reporter)
    if tensorrt.has_timing_cache:
        read_timing_cache(config, job.folder / TIMING_CACHE_NAME)
    return config


def set_flags(config: Any, trt: Any, *, dtype: str) -> None:
    """Switch off TF32 in float32 bundles, and allocations while an engine runs.

    By default TensorRT rounds the inputs of float32 products to TF32, which would cost a float32 bundle its accuracy; in a
    float16 bundle TF32 loses nothing. By default tensorrt-rtx allocates while it runs, and then cannot be captured.
    """
    if dtype == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)
    if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(flag)


def optimization_profile(builder: Any, spec: GraphSpec, profile: Profile) -> Any:
    """Return a profile with one shape per input: min, opt and max are the same."""
    result = builder.create_optimization_profile()
    for tensor in spec.inputs:
        shape = shape_at(tensor.shape, profile)
        result.set_shape(tensor.name, shape, shape, shape)
    return result


def read_timing_cache(config: Any, file: Path) -> None:
    """Give ``config`` the timings in ``file``, unless they belong to another TensorRT or GPU."""
    kept = file.read_bytes() if file.exists() else b""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(kept)
        if kept and (cache is None or not config.set_timing_cache(cache, False)):
            cache, kept = config.create_timing_cache(b""), b""
        if not kept:
            config.set_timing_cache(cache, False)


def write_timing_cache(config: Any, file: Path) -> None:
    """Store the timings of ``config`` in ``file``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        file.write_bytes(memoryview(config.get_timing_cache().serialize()))


def write_engine(
    tensorrt: TensorRT, builder: Any, definition: Any, config: Any, file: Path
) -> tuple[int, str]:
    """Build and write the engine; return its size and SHA-256."""
    with file.open("wb") as stream:
        if tensorrt.streams_engines:
            writer = _stream_writer(tensorrt.module, stream)
            built = builder.build_serialized_network_to_stream(definition, config, writer)
            if writer.failure is not None:
                raise writer.failure
            if not built:
                raise BackendError("TensorRT built no engine and gave no reason")
        else:
            stream.write(_not_none(builder.build_serialized_network(definition, config), "engine"))
    return file.stat().st_size, sha256_of(file)


def _not_none(value: Any, what: str) -> Any:
    if value is None:
        raise BackendError(f"TensorRT made no {what} and gave no reason")
    return value


def _progress_monitor(trt: Any, reporter: Reporter) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._reported = 0.0

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            reporter.send(kind="phase", name=phase_name, num_steps=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            now = time.monotonic()
            if now - self._reported > _STEP_SECONDS:
                self._reported = now
                reporter.send(kind="step", name=phase_name, step=step)
            return True

        def phase_finish(self, _phase_name: str) -> None:
            pass  # the next phase says as much

    return Monitor()


def _stream_writer(trt: Any, stream: Any) -> Any:
    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.failure: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.failure is not None:
                return 0
            try:
                stream.write(data)
            except OSError as error:  # exceptions cannot pass through TensorRT
                self.failure = error
                return 0
            return len(data)

    return Writer()


def _follow_parent() -> None:
    """End this process when its parent ends, and leave Ctrl-C to the parent."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
        go_first_when_memory_runs_out()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def go_first_when_memory_runs_out() -> None:
    """Let the system kill this process rather than the desktop when memory runs out."""
    # In a container the score may already be higher; only the administrator may lower it.
    with suppress(OSError):
        _OOM_SCORE.write_text("800")
