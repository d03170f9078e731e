"""Builds the engines of a bundle: plans the build, runs one process per graph, and writes ``engines.json`` last.

A plan estimates the memory and time for building each engine, and its size. W are the graph's weights in bytes:

    engine   W + profiles * architectures * 3 MB of kernels
    peak     W                 the weight files, which the parser maps: the system can take these pages back
           + W                 TensorRT's copy, from which the engine is written piece by piece
           + W                 the serialized engine, in releases that cannot do so, such as 10.3
           + W                 with ``tensorrt``: the copy on the GPU for timing tactics; a Jetson's GPU shares the memory
           + min(W, 0.6 GB)    the optimizer's working memory
           + 0.4 GB            Python and TensorRT's libraries
    time     3 s + 15 s per GB of weights

Fitted to tensorrt-rtx 1.7 on the graphs of LLaVA-NeXT-7B, with and without writing in pieces; docs/runtime.md has the
measurements. On two CPUs, times were between half and twice the estimate. Memory and time of ``tensorrt`` are not
measured: it times tactics on the GPU, which tensorrt-rtx leaves to the first run.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.fp8 import fp8_refusal
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME, PART_FROM_ROLE, GraphSpec
from trio_edge.runtime.bundle.reader import sha256_of
from trio_edge.runtime.devices.machine import Host, available_memory_bytes, find_host
from trio_edge.runtime.engines import files
from trio_edge.runtime.engines.child import LOG_NAME, Job, holds_head, run_job
from trio_edge.runtime.engines.package import EngineBackend, TensorRT, choose_backend, load_tensorrt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from trio_edge.runtime.bundle.manifest import Manifest
    from trio_edge.runtime.bundle.reader import Bundle

_SPARE_BYTES = 64 << 20  # for kernels, the timing cache and engines.json
_TWICE = 1.25
"""An engine larger than its kernels and this many times its graph's weights holds some weights twice."""
_KERNELS_BYTES = 3_000_000
_BASE_BYTES = 400_000_000
_WORK_BYTES = 600_000_000
_BASE_SECONDS, _SECONDS_PER_BYTE = 3.0, 15e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """The user's choices for a build."""

    backend: str = "auto"
    compute_capabilities: tuple[int, ...] = ()
    """GPUs to build for; empty for this machine's GPU."""
    graphs: tuple[str, ...] = ()
    """Names of the graphs to build; empty for all."""
    force: bool = False
    """Replace engines that exist."""
    separate: bool = False
    """Build each piece of a graph into an engine of its own, which holds the weights again."""
    split_lm_head: int = 1
    """Number of blocks that the lm_head is split into."""
    detailed_layers: bool = False
    """Keep names and shapes of layers in the engines, for profiling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedGraph:
    """A graph to build an engine for, with estimates."""

    spec: GraphSpec
    engine_bytes: int
    """Size of the engine file."""
    peak_bytes: int
    """Resident memory of the process that builds it."""

    @property
    def mapped_bytes(self) -> int:
        """Part of ``peak_bytes`` in mapped weight files, whose pages the system can take back."""
        return self.spec.weight_bytes

    @property
    def seconds(self) -> float:
        """Seconds of the build for one compute capability."""
        return _BASE_SECONDS + _SECONDS_PER_BYTE * self.spec.weight_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """A planned build; nothing has been written yet."""

    bundle: Bundle
    tensorrt: TensorRT
    host: Host
    folder: Path
    """``engines/<target>`` of the bundle."""
    compute_capabilities: tuple[int, ...]
    graphs: tuple[PlannedGraph, ...]
    options: BuildOptions
    kept: tuple[files.EngineEntry, ...] = ()
    """Engines in ``folder`` that stay as they are."""

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the files to write."""
        return sum(graph.engine_bytes for graph in self.graphs) + _SPARE_BYTES

    @property
    def warnings(self) -> tuple[str, ...]:
        """Possible problems, one line each."""
        needed = max(graph.peak_bytes - graph.mapped_bytes for graph in self.graphs)
        available = available_memory_bytes()
        if available is None or needed <= available:
            return ()
        needs = f"building may need {needed / 1e9:.1f} GB of memory apart from mapped files"
        return (f"{needs}, {available / 1e9:.1f} GB are available; close other programs or add swap",)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """Callbacks that report the progress of a build; by default they do nothing."""

    graph: Callable[[PlannedGraph], None] = lambda _graph: None
    """Before each graph."""
    report: Callable[[dict[str, Any]], None] = lambda _report: None
    """TensorRT's progress, see ``engines.child``."""
    done: Callable[[files.EngineEntry], None] = lambda _entry: None
    """After each graph."""
    warn: Callable[[str], None] = lambda _text: None


def planned_graphs(
    bundle: Bundle, options: BuildOptions, *, tensorrt: TensorRT | None = None, num_architectures: int = 1
) -> tuple[PlannedGraph, ...]:
    """Return the graphs of ``options``, or their pieces, in the bundle's order, with estimates.

    The estimates are for ``num_architectures`` compute capabilities and ``tensorrt``, by default tensorrt-rtx.

    Raises:
        BackendError: If there is no such graph.
    """
    names, known = options.graphs, [spec.name for spec in bundle.manifest.graphs]
    if unknown := [name for name in names if name not in known]:
        raise BackendError(
            f"--graphs: expected some of {', '.join(known)}, got {unknown[0]!r}; choose among them"
        )
    backend: EngineBackend = "tensorrt-rtx" if tensorrt is None else tensorrt.backend
    streams = tensorrt is None or tensorrt.streams_engines
    return tuple(
        planned_graph(spec, backend=backend, streams_engines=streams, num_architectures=num_architectures)
        for graph in bundle.manifest.graphs
        if not names or graph.name in names
        for spec in (graph.split() if options.separate else (graph,))
    )


def planned_graph(
    spec: GraphSpec, *, backend: EngineBackend, streams_engines: bool, num_architectures: int
) -> PlannedGraph:
    """Return ``spec`` with the estimates for building its engine for ``num_architectures`` compute capabilities.

    ``streams_engines`` is ``TensorRT.streams_engines``.
    """
    weights = spec.weight_bytes
    copies = 2 + (backend == "tensorrt") + (not streams_engines)
    return PlannedGraph(
        spec=spec,
        engine_bytes=weights + len(spec.profiles) * num_architectures * _KERNELS_BYTES,
        peak_bytes=copies * weights + min(weights, _WORK_BYTES) + _BASE_BYTES,
    )


def plan_build(bundle: Bundle, options: BuildOptions, *, host: Host | None = None) -> BuildPlan:
    """Return the plan of a build with ``options`` on ``host``, by default this machine.

    Raises:
        BackendError: If an option is impossible, no TensorRT is installed, a GPU does not support the weights' format, or
            engines exist that may not be replaced.
    """
    host = find_host() if host is None else host
    if (blocks := options.split_lm_head) < 1:
        raise BackendError(f"--split-lm-head: expected 1 or more blocks, got {blocks}; 4 is usual")
    graphs = planned_graphs(bundle, options)
    if options.split_lm_head > 1 and not any(holds_head(graph.spec) for graph in graphs):
        raise BackendError(
            f"--split-lm-head: expected head or gradient in --graphs, got {', '.join(options.graphs)};"
            " drop one of the options"
        )
    _check_formats(bundle, graphs, options, host)
    backend = choose_backend(options.backend, host=host, ahead_of_time=bool(options.compute_capabilities))
    tensorrt = load_tensorrt(backend)
    capabilities = resolve_capabilities(options.compute_capabilities, tensorrt=tensorrt, host=host)
    name = files.target_name(backend, version=tensorrt.version, compute_capabilities=capabilities)
    folder = bundle.folder / files.ENGINES_FOLDER / name
    plan = BuildPlan(
        bundle=bundle,
        tensorrt=tensorrt,
        host=host,
        folder=folder,
        compute_capabilities=capabilities,
        graphs=planned_graphs(bundle, options, tensorrt=tensorrt, num_architectures=len(capabilities)),
        options=options,
    )
    return replace(plan, kept=_kept_engines(plan))


def _check_formats(bundle: Bundle, graphs: Sequence[PlannedGraph], options: BuildOptions, host: Host) -> None:
    """Raise BackendError if a GPU to build for does not support the formats of ``graphs``."""
    wanted = [(capability, "--compute-capability") for capability in options.compute_capabilities]
    own = [] if host.gpu is None else [(host.gpu.compute_capability, host.gpu.name)]
    formats = {graph.spec.name: bundle.manifest.format_of(graph.spec) for graph in graphs}
    for capability, where in wanted or own:
        refusal = fp8_refusal(formats, capability=capability, where=where)
        if refusal is not None:
            raise BackendError(refusal)


def resolve_capabilities(wanted: tuple[int, ...], *, tensorrt: TensorRT, host: Host) -> tuple[int, ...]:
    """Return the compute capabilities to build for, ascending: ``wanted``, or that of this machine's GPU.

    Raises:
        BackendError: If ``tensorrt`` cannot build for them on ``host``.
    """
    possible = tensorrt.ahead_of_time
    own = () if host.gpu is None else (host.gpu.compute_capability,)
    if not possible:
        if not own:
            raise BackendError(
                f"{tensorrt.backend}: expected an NVIDIA GPU, as it builds only for the one it runs on, got none;"
                " build on the target, or with --backend tensorrt-rtx --compute-capability 86"
            )
        if wanted and wanted != own:
            raise BackendError(
                f"--compute-capability: expected {own[0]}, as {tensorrt.backend} builds for this machine's GPU,"
                f" got {','.join(map(str, wanted))}; drop the option or build on the target"
            )
        return own
    chosen = tuple(sorted(set(wanted))) or own
    if not chosen:
        raise BackendError(
            "--compute-capability: expected some, as no GPU was found here, got none;"
            f" choose among {','.join(map(str, possible))}, for instance 86,89"
        )
    if impossible := [number for number in chosen if number not in possible]:
        is_orin = impossible[0] == 87
        hint = "build on the Jetson Orin itself, with --backend tensorrt" if is_orin else "choose among them"
        raise BackendError(
            f"--compute-capability: expected some of {','.join(map(str, possible))}, which {tensorrt.backend}"
            f" {tensorrt.version} builds for, got {impossible[0]}; {hint}"
        )
    return chosen


def _kept_engines(plan: BuildPlan) -> tuple[files.EngineEntry, ...]:
    """Return the engines in the plan's folder that stay there when only some graphs are built.

    Raises:
        BackendError: If the folder holds something that may not be replaced.
    """
    folder, options = plan.folder, plan.options
    if not folder.exists():
        return ()
    if not (folder / files.ENGINES_NAME).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise BackendError(f"{folder}: expected engines or nothing, got something else; move it away")
    try:
        old = files.read_engine_set(folder)
    except BackendError:
        old = None
    fits = old is not None and (
        old.tensorrt_version == plan.tensorrt.version
        and old.platform == plan.host.platform
        and old.manifest_sha256 == sha256_of(plan.bundle.folder / MANIFEST_NAME)
        and (old.detailed_layers, old.split_lm_head) == (options.detailed_layers, options.split_lm_head)
    )
    kept = []
    if old is not None and fits and options.graphs:
        sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        kept = [entry for entry in old.engines if sizes.get(entry.file) == entry.num_bytes]
    others = tuple(entry for entry in kept if entry.graph.partition(".")[0] not in options.graphs)
    if not options.force and (not kept or len(others) < len(kept)):
        raise BackendError(f"{folder}: expected no engines, they exist; add --force to replace them")
    return others


def build_engines(plan: BuildPlan, *, progress: BuildProgress = BuildProgress()) -> files.EngineSet:
    """Build all engines of ``plan`` and return the content of ``engines.json``. A failed build changes nothing.

    Raises:
        BackendError: If a graph cannot be built, memory or disk space runs out, or the folder cannot be written.
    """
    gpu, digest = plan.host.gpu, sha256_of(plan.bundle.folder / MANIFEST_NAME)
    check = partial(_check_unchanged, plan)
    with files.atomic_engines(plan.folder, num_bytes=plan.disk_bytes, before_rename=check) as folder:
        for entry in plan.kept:
            _link(plan.folder / entry.file, folder / entry.file)
        with suppress(OSError):  # without a readable cache, tactics are timed again
            shutil.copyfile(plan.folder / files.TIMING_CACHE_NAME, folder / files.TIMING_CACHE_NAME)
        built = [_build_graph(plan, graph, folder, progress) for graph in plan.graphs]
        (folder / LOG_NAME).unlink(missing_ok=True)  # only needed for the message of a failed build
        order = [spec.name for spec in plan.bundle.manifest.graphs]
        engines = sorted((*plan.kept, *built), key=lambda entry: order.index(entry.graph.partition(".")[0]))
        engine_set = files.EngineSet(
            schema_version=files.ENGINES_SCHEMA_VERSION,
            backend=plan.tensorrt.backend,
            tensorrt_version=plan.tensorrt.version,
            compute_capabilities=plan.compute_capabilities,
            platform=plan.host.platform,
            gpu=None if gpu is None else gpu.name,
            driver=None if gpu is None else gpu.driver,
            manifest_sha256=digest,
            detailed_layers=plan.options.detailed_layers,
            split_lm_head=plan.options.split_lm_head,
            engines=tuple(engines),
        )
        files.write_engine_set(folder, engine_set)
    return engine_set


def _check_unchanged(plan: BuildPlan) -> None:
    """Raise BackendError if another build has written to the plan's folder in the meantime: its engines would be lost."""
    if _kept_engines(plan) != plan.kept:
        raise BackendError(
            f"{plan.folder}: expected the engines from the start of the build, got those of another build; run this one again"
        )


def _build_graph(
    plan: BuildPlan, graph: PlannedGraph, folder: Path, progress: BuildProgress
) -> files.EngineEntry:
    progress.graph(graph)
    spec, dimensions = graph.spec, plan.bundle.manifest.dimensions
    job = Job(
        backend=plan.tensorrt.backend,
        spec=spec,
        graph_file=plan.bundle.path(spec.file).resolve(),
        folder=folder.resolve(),
        compute_capabilities=plan.compute_capabilities if plan.tensorrt.ahead_of_time else (),
        detailed_layers=plan.options.detailed_layers,
        dtype=plan.bundle.manifest.dtype,
        split_lm_head=plan.options.split_lm_head,
        lm_head_shape=(dimensions.vocab_size, dimensions.hidden_size),
        advice=_advice(plan.bundle.manifest, spec),
    )
    result = _run_process(job, graph, progress)
    entry = files.EngineEntry(
        graph=spec.name,
        file=job.engine_file.name,
        profiles=spec.profiles,
        num_bytes=result["num_bytes"],
        sha256=result["sha256"],
        build_seconds=round(result["seconds"], 3),
        peak_memory_bytes=result["peak_memory_bytes"],
    )
    kernels = graph.engine_bytes - spec.weight_bytes
    if entry.num_bytes > _TWICE * spec.weight_bytes + 4 * kernels:
        progress.warn(
            f"{spec.name}: the engine has {entry.num_bytes / 1e9:.2f} GB for {spec.weight_bytes / 1e9:.2f} GB of weights:"
            " TensorRT stored some of them twice, for prefill and for decode"
        )
    progress.done(entry)
    return entry


def _run_process(job: Job, graph: PlannedGraph, progress: BuildProgress) -> dict[str, Any]:
    """Run ``job`` in a separate process and return its last report; raises BackendError if it failed or was killed."""
    # Spawned, because CUDA's state does not survive a fork.
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=run_job, args=(job, writer), daemon=True)
    reports: dict[str, dict[str, Any]] = {}
    try:
        with _ctrl_c_later():
            process.start()
        writer.close()
        while True:
            try:
                report = reader.recv()
            except (EOFError, OSError):
                break
            reports[report["kind"]] = report
            progress.report(report)
        process.join()
    finally:
        if process.is_alive():
            process.kill()
            process.join()
        reader.close()
    if "done" in reports and process.exitcode == 0:
        return reports["done"]
    raise BackendError(_failure(job, graph, reports.get("error"), process.exitcode))


def _failure(job: Job, graph: PlannedGraph, error: dict[str, Any] | None, exit_code: int | None) -> str:
    where = f"{job.spec.name}: expected {job.backend} to build this graph"
    if error is not None:
        return f"{where}, got: {error['text']}; no engine was changed{job.advice}"
    if sys.platform != "win32" and exit_code == -signal.SIGKILL:
        return (
            f"{where}, its process was killed, most likely because memory ran out (it needs about"
            f" {graph.peak_bytes / 1e9:.1f} GB); close other programs or add swap"
        )
    file = job.folder / LOG_NAME
    log = file.read_text(errors="replace").strip() if file.exists() else ""
    last = (log or "it printed nothing").splitlines()[-1].strip()[:300]
    has_crashed = exit_code is not None and exit_code < 0
    reason = f"crashed with signal {-(exit_code or 0)}" if has_crashed else f"ended with code {exit_code}"
    return f"{where}, its process {reason}: {last}; no engine was changed"


def _advice(manifest: Manifest, spec: GraphSpec) -> str:
    """Return what to do if TensorRT fails, as 1.7 for RTX does where linear attention has INT8 weights and exact inputs."""
    has_loop = any(name.endswith(".delta") for name in spec.input_names)
    inputs = () if manifest.quantization is None else manifest.quantization.inputs
    if not has_loop or manifest.format_of(spec) != "int8" or PART_FROM_ROLE[spec.role] in inputs:
        return ""
    return "; linear attention in INT8 needs rounded inputs, too: export with scales of trio-calibrate, or in INT4"


@contextmanager
def _ctrl_c_later() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. Processes started in the block never see it: the parent alone answers it."""
    if sys.platform == "win32":
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
