"""The needs of a build, compared with this machine: the report of ``trio-build --dry-run``.

Nothing is written. Problems are collected, not raised, so that one report names all of them.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.machine import Host, available_memory_bytes, find_host, l4t_release
from trio_edge.runtime.devices.memory import estimate
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, PlannedGraph, plan_build, planned_graphs
from trio_edge.runtime.engines.estimate import BuildMemory, estimate_seconds
from trio_edge.runtime.engines.files import check_engines_place
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, load_tensorrt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.reader import Bundle


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildNeeds:
    """The report, with sizes in bytes; None means not known."""

    bundle: Bundle
    options: BuildOptions
    host: Host
    tensorrt: dict[str, str | None]
    """Version of each backend's package; None if it is not installed."""
    plan: BuildPlan | None
    """None if nothing can be built here."""
    graphs: tuple[PlannedGraph, ...]
    problems: tuple[str, ...]
    """Problems that keep the build from starting, each in one line that says what to do."""
    warnings: tuple[str, ...]
    """Possible problems, one line each."""
    available_bytes: int | None
    free_disk_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Estimated size of the files to write."""
        return sum(graph.memory.engine_bytes for graph in self.graphs)

    @property
    def peak(self) -> BuildMemory:
        """Memory of the largest build; builds run one after the other."""
        return max((graph.memory for graph in self.graphs), key=lambda memory: memory.peak_bytes)

    @property
    def seconds(self) -> float:
        """Estimated seconds of all builds."""
        return sum(estimate_seconds(graph.spec) for graph in self.graphs)

    @property
    def run_bytes(self) -> dict[str, int]:
        """Device memory for running the whole bundle, in bytes by purpose."""
        return _run_bytes(self.bundle)

    @property
    def command(self) -> str:
        """Command line that starts the build."""
        options = self.options
        words = ["trio-build", str(self.bundle.folder)]
        if options.backend != "auto":
            words += ["--backend", options.backend]
        if options.compute_capabilities:
            words += ["--compute-capability", ",".join(map(str, options.compute_capabilities))]
        if options.graphs:
            words += ["--graphs", ",".join(options.graphs)]
        if options.split_lm_head != BuildOptions().split_lm_head:
            words += ["--split-lm-head", str(options.split_lm_head)]
        if options.detailed_layers:
            words.append("--verbose-layers")
        if options.force:
            words.append("--force")
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        gpu, plan = self.host.gpu, self.plan
        return {
            "ready": not self.problems,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "command": self.command,
            "tensorrt": dict(self.tensorrt),
            "backend": None if plan is None else plan.tensorrt.backend,
            "compute_capabilities": [] if plan is None else list(plan.compute_capabilities),
            "folder": None if plan is None else str(plan.folder),
            "kept": [] if plan is None else [entry.graph for entry in plan.kept],
            "platform": self.host.platform,
            "python": platform.python_version(),
            "l4t": l4t_release(),
            "gpu": None if gpu is None else dataclasses.asdict(gpu),
            "seconds": round(self.seconds),
            "disk_bytes": self.disk_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "peak_bytes": self.peak.peak_bytes,
            "mapped_bytes": self.peak.mapped_bytes,
            "available_bytes": self.available_bytes,
            "run_bytes": self.run_bytes,
            "graphs": [
                {
                    "name": graph.spec.name,
                    "profiles": {profile.name: profile.sizes for profile in graph.spec.profiles},
                    "weight_bytes": graph.spec.weight_bytes,
                    "engine_bytes": graph.memory.engine_bytes,
                    "peak_bytes": graph.memory.peak_bytes,
                    "seconds": round(estimate_seconds(graph.spec)),
                }
                for graph in self.graphs
            ],
        }


def build_needs(bundle: Bundle, options: BuildOptions, *, host: Host | None = None) -> BuildNeeds:
    """Return the needs of a build with ``options`` on ``host``, by default this machine.

    Raises:
        BackendError: If ``options`` name a graph that the bundle does not have.
    """
    host = find_host() if host is None else host
    graphs = planned_graphs(
        bundle, options.graphs, num_architectures=max(1, len(options.compute_capabilities))
    )
    plan, problems, warnings = None, [], []
    try:
        plan = plan_build(bundle, options, host=host)
        check_engines_place(plan.folder)
    except BackendError as error:
        problems.append(str(error))
    if plan is not None:
        graphs, warnings = plan.graphs, list(plan.warnings)
    free = shutil.disk_usage(bundle.folder).free
    needed = sum(graph.memory.engine_bytes for graph in graphs) if plan is None else plan.disk_bytes
    if needed > free:
        problems.append(
            f"{bundle.folder}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB;"
            f" free {_gb_up(needed - free)} GB, or move the bundle to another disk"
        )
    warnings += _cannot_run(bundle, host, plan)
    return BuildNeeds(
        bundle=bundle,
        options=options,
        host=host,
        tensorrt=_installed(plan),
        plan=plan,
        graphs=graphs,
        problems=tuple(problems),
        warnings=tuple(warnings),
        available_bytes=available_memory_bytes(),
        free_disk_bytes=free,
    )


def _installed(plan: BuildPlan | None) -> dict[str, str | None]:
    """Return the packages' versions; with a plan only its own, because the packages share libraries."""
    versions: dict[str, str | None] = {}
    for backend in ENGINE_BACKENDS if plan is None else (plan.tensorrt.backend,):
        try:
            versions[backend] = load_tensorrt(backend).version
        except BackendError:
            versions[backend] = None
    return versions


def _cannot_run(bundle: Bundle, host: Host, plan: BuildPlan | None) -> list[str]:
    """Return a warning if the engines are for this machine's GPU and it has too little memory to run them."""
    gpu = host.gpu
    if gpu is None or plan is None or gpu.compute_capability not in plan.compute_capabilities:
        return []
    parts = _run_bytes(bundle)
    needed = sum(parts.values())
    if needed <= gpu.memory_bytes:
        return []
    has = f"{gpu.name} has {gpu.memory_bytes / 1e9:.1f} GB"
    text = f"running needs about {needed / 1e9:.1f} GB on the GPU ({in_words(parts)}), {has};"
    return [f"{text} export with fewer stages, less text or smaller weights"]


def in_words(parts: Mapping[str, int]) -> str:
    """Return gigabytes by purpose, such as "weights 1.20, buffers 0.10"."""
    return ", ".join(f"{name} {count / 1e9:.2f}" for name, count in parts.items())


def _run_bytes(bundle: Bundle) -> dict[str, int]:
    graphs = bundle.manifest.graphs
    return estimate(bundle.manifest, graphs, weight_bytes=sum(spec.weight_bytes for spec in graphs))


def _gb_up(num_bytes: int) -> str:
    """Return gigabytes with two decimals, rounded up so that freeing as much suffices."""
    return f"{math.ceil(num_bytes / 1e7) / 100:.2f}"
