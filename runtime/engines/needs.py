"""The needs of a build, compared with this machine: the report of ``trio-build --dry-run``.

Nothing is written. Problems are collected, not raised, so that one report names all of them.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shlex
import shutil
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.devices.machine import Host, available_memory_bytes, find_host, l4t_release
from trio_edge.runtime.devices.memory import estimate
from trio_edge.runtime.engines.build import BuildOptions, BuildPlan, plan_build, planned_graphs
from trio_edge.runtime.engines.files import check_engines_place
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, load_tensorrt

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.reader import Bundle


def build_needs(bundle: Bundle, options: BuildOptions, *, host: Host | None = None) -> dict[str, Any]:
    """Return the needs of a build with ``options`` on ``host``, by default this machine, as JSON types.

    Sizes are in bytes, times in seconds; None means not known. ``problems`` keep the build from starting, each in one line that
    says what to do; ``warnings`` are possible problems. ``tensorrt`` has the version of each backend's package, None if it is
    not installed. ``backend`` and ``folder`` are None if nothing can be built here. ``peak_bytes`` and ``mapped_bytes`` are
    those of the largest build, because builds run one after the other. ``run_bytes`` is the device memory for running the
    whole bundle, by purpose. ``command`` starts the build.

    Raises:
        BackendError: If ``options`` name a graph that the bundle does not have.
    """
    host = find_host() if host is None else host
    num_architectures = max(1, len(options.compute_capabilities))
    graphs = planned_graphs(bundle, options, num_architectures=num_architectures)
    plan, problems, warnings = None, [], []
    try:
        plan = plan_build(bundle, options, host=host)
        check_engines_place(plan.folder)
    except BackendError as error:
        problems.append(str(error))
    if plan is not None:
        graphs, warnings = plan.graphs, list(plan.warnings)
    free, disk_bytes = shutil.disk_usage(bundle.folder).free, sum(graph.engine_bytes for graph in graphs)
    needed = disk_bytes if plan is None else plan.disk_bytes
    if needed > free:
        missing = math.ceil((needed - free) / 1e7) / 100  # rounded up, so that freeing as much suffices
        problems.append(
            f"{bundle.folder}: expected {needed / 1e9:.2f} GB of free space, got {free / 1e9:.2f} GB;"
            f" free {missing:.2f} GB, or move the bundle to another disk"
        )
    specs, largest = bundle.manifest.graphs, max(graphs, key=lambda graph: graph.peak_bytes)
    run_bytes = estimate(bundle.manifest, specs, weight_bytes=sum(spec.weight_bytes for spec in specs))
    return {
        "ready": not problems,
        "problems": problems,
        "warnings": warnings + _cannot_run(run_bytes, host, plan),
        "command": _command(bundle, options),
        "tensorrt": _installed(plan),
        "backend": None if plan is None else plan.tensorrt.backend,
        "compute_capabilities": [] if plan is None else list(plan.compute_capabilities),
        "folder": None if plan is None else str(plan.folder),
        "kept": [] if plan is None else [entry.graph for entry in plan.kept],
        "platform": host.platform,
        "python": platform.python_version(),
        "l4t": l4t_release(),
        "gpu": None if host.gpu is None else dataclasses.asdict(host.gpu),
        "seconds": round(sum(graph.seconds for graph in graphs)),
        "disk_bytes": disk_bytes,
        "free_disk_bytes": free,
        "peak_bytes": largest.peak_bytes,
        "mapped_bytes": largest.mapped_bytes,
        "available_bytes": available_memory_bytes(),
        "run_bytes": run_bytes,
        "graphs": [
            {
                "name": graph.spec.name,
                "profiles": {profile.name: profile.sizes for profile in graph.spec.profiles},
                "weight_bytes": graph.spec.weight_bytes,
                "engine_bytes": graph.engine_bytes,
                "peak_bytes": graph.peak_bytes,
                "seconds": round(graph.seconds),
            }
            for graph in graphs
        ],
    }


def _command(bundle: Bundle, options: BuildOptions) -> str:
    """Return the command line that starts the build."""
    values = {
        "--backend": "" if options.backend == "auto" else options.backend,
        "--compute-capability": ",".join(map(str, options.compute_capabilities)),
        "--graphs": ",".join(options.graphs),
        "--split-lm-head": "" if options.split_lm_head == 1 else str(options.split_lm_head),
    }
    words = [word for name, value in values.items() if value for word in (name, value)]
    words += ["--separate"] * options.separate + ["--verbose-layers"] * options.detailed_layers
    words += ["--force"] * options.force
    return shlex.join(["trio-build", str(bundle.folder), *words])


def _installed(plan: BuildPlan | None) -> dict[str, str | None]:
    """Return the packages' versions; with a plan only its own, because the packages share libraries."""
    versions: dict[str, str | None] = {}
    for backend in ENGINE_BACKENDS if plan is None else (plan.tensorrt.backend,):
        try:
            versions[backend] = load_tensorrt(backend).version
        except BackendError:
            versions[backend] = None
    return versions


def _cannot_run(run_bytes: dict[str, int], host: Host, plan: BuildPlan | None) -> list[str]:
    """Return a warning if the engines are for this machine's GPU and it has too little memory to run them."""
    gpu, needed = host.gpu, sum(run_bytes.values())
    if gpu is None or plan is None or gpu.compute_capability not in plan.compute_capabilities:
        return []
    text = (
        f"running needs about {needed / 1e9:.1f} GB on the GPU ({in_words(run_bytes)}), {gpu.name} has"
        f" {gpu.memory_bytes / 1e9:.1f} GB; export with fewer stages, less text or smaller weights"
    )
    return [text] if needed > gpu.memory_bytes else []


def in_words(parts: Mapping[str, int]) -> str:
    """Return gigabytes by purpose, such as "weights 1.20, buffers 0.10"."""
    return ", ".join(f"{name} {count / 1e9:.2f}" for name, count in parts.items())
