"""Engines of the shared reduced bundle, built once in a test run by the real command."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from tests.shared_folder import made_once
from trio_edge.runtime.cli.build import main
from trio_edge.runtime.devices.machine import Gpu, Host
from trio_edge.runtime.engines.child import Job, Reporter, build_engine

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from trio_edge.runtime.bundle.reader import Bundle

GPU = Gpu(name="a GPU", compute_capability=86, memory_bytes=8 << 30, driver="560.35 (CUDA 12.6)")
HOST = Host(machine="x86_64", system="Linux", gpu=GPU)
"""A machine that the engines run on, if it has the TensorRT that built them."""


def copy_bundle(source: Path, target: Path) -> Path:
    """Return ``target``, a copy of the bundle; hard links would do, but onnx refuses files that have several."""
    return shutil.copytree(source, target)


def bundle_with_engines(reduced_bundle: Path) -> Path:
    """Return a copy of ``reduced_bundle`` with all engines for compute capability 8.6. Nobody may change it."""

    def make(folder: Path) -> None:
        shutil.copytree(reduced_bundle, folder)
        assert main([str(folder), "--backend", "tensorrt-rtx", "--compute-capability", "86", "--quiet"]) == 0

    return made_once("bundle-with-engines", make)


def build_here(
    bundle: Bundle, folder: Path, *, graphs: Collection[str] | None = None, compute_capability: int = 86
) -> dict[str, int]:
    """Build the engines of ``bundle``, or of its graphs named ``graphs``, in this process; return their sizes by graph.

    Each has its smallest profile and its last one, which is decode's; ``bundle_with_engines`` has all.
    """
    sizes, dimensions = {}, bundle.manifest.dimensions
    for graph in bundle.manifest.graphs:
        if graphs is not None and graph.name not in graphs:
            continue
        ends = graph.profiles if len(graph.profiles) < 2 else (graph.profiles[0], graph.profiles[-1])
        spec = msgspec.structs.replace(graph, profiles=ends)
        reports: list[Any] = []
        job = Job(
            backend="tensorrt-rtx",
            spec=spec,
            graph_file=bundle.path(spec.file).resolve(),
            folder=folder,
            compute_capabilities=(compute_capability,),
            detailed_layers=False,
            dtype=bundle.manifest.dtype,
            split_lm_head=1,
            lm_head_shape=(dimensions.vocab_size, dimensions.hidden_size),
        )
        build_engine(job, Reporter(SimpleNamespace(send=reports.append)))
        assert reports[-1]["kind"] == "done", reports
        sizes[spec.name] = reports[-1]["num_bytes"]
    return sizes


def engine_folder(bundle: Path) -> Path:
    """Return the only folder of engines in ``bundle``."""
    (folder,) = (bundle / "engines").iterdir()
    return folder


def replace_bytes(file: Path, content: bytes) -> None:
    """Give ``file`` other content without touching what it is a hard link of."""
    file.unlink()
    file.write_bytes(content)
