"""Chooses a backend by name or for this machine. Imports a backend's package only when it is chosen."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trio_edge.runtime.bundle.errors import BackendError, install_command
from trio_edge.runtime.bundle.limits import is_whole
from trio_edge.runtime.devices import machine
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, installed_backend

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.backends.interface import Backend, OnnxRuntimeName
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.engines.cpu import CpuAccuracy

_ONNX_RUNTIMES: tuple[OnnxRuntimeName, ...] = ("onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime")
# Each graph gets this many threads. If the system has no more threads to give, onnxruntime waits forever.
_MOST_THREADS = 16
BACKENDS = (*ENGINE_BACKENDS, *_ONNX_RUNTIMES)
CPU_ACCURACIES: tuple[CpuAccuracy, ...] = ("auto", "float32", "int8")
BACKENDS_HELP = (
    "Backend that runs the graphs: auto (the fastest here), tensorrt, tensorrt-rtx (both run engines from trio-build),"
    " onnxruntime-tensorrt, onnxruntime-cuda or onnxruntime (CPU)."
)


def make_backend(
    name: str = "auto",
    *,
    bundle: Bundle | None = None,
    threads: int = 0,
    cpu_accuracy: CpuAccuracy = "auto",
    cuda_graph: bool = True,
    layer_times: Path | None = None,
) -> Backend:
    """Return the backend called ``name``; for "auto" the fastest that can run ``bundle`` here.

    "auto" takes the bundle's TensorRT engines if they fit this machine, else ONNX Runtime's CUDA provider if there is a
    GPU, else ONNX Runtime on the CPU.

    Args:
        name: "auto" or one of ``BACKENDS``.
        bundle: Bundle to run; without it "auto" takes no engines.
        threads: CPU threads for one graph; 0 lets the backend choose.
        cpu_accuracy: Type of the activations that ONNX Runtime multiplies with INT4 and INT8 weights on the CPU. "int8"
            takes a third of the time of "float32"; "auto" takes it for large graphs, where the difference is noticeable.
        cuda_graph: Capture decode with TensorRT as a CUDA graph; False helps to find out whether capturing causes an error.
        layer_times: Folder for layer times. When a graph is closed, it writes the times of its layers in every run, as
            the backend's profiler reports them, to ``<graph>.json``. Recording them slows the graphs down.

    Raises:
        BackendError: If there is no such backend, or something that it needs is missing.
    """
    notes: tuple[str, ...] = ()
    if name == "auto":
        name, notes = _fastest(bundle)
    if (engine_backend := next((known for known in ENGINE_BACKENDS if known == name), None)) is not None:
        from trio_edge.runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(engine_backend, cuda_graph=cuda_graph, layer_times=layer_times)
    if (onnx_runtime := next((known for known in _ONNX_RUNTIMES if known == name), None)) is None:
        raise BackendError(
            f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r:.80}; choose one of them"
        )
    if cpu_accuracy not in CPU_ACCURACIES:
        raise BackendError(
            f"cpu_accuracy: expected one of {', '.join(CPU_ACCURACIES)}, got {cpu_accuracy!r:.80}; choose one of them"
        )
    most = max(_MOST_THREADS, os.cpu_count() or 1)
    if not is_whole(threads) or not 0 <= threads <= most:
        raise BackendError(
            f"threads: expected 0..{most}, got {threads!r:.80}; choose at most one per processor, or 0 for the backend's choice"
        )
    if find_spec("onnxruntime") is None:
        raise BackendError(
            f"backend: expected onnxruntime to be installed, it is not; run {install_command('ort')}"
        )
    from trio_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(onnx_runtime, threads, cpu_accuracy, layer_times, notes)


def with_accuracy(backend: str, cpu_accuracy: CpuAccuracy) -> str:
    """Return the backend's name for a report, with the CPU accuracy if the user has chosen one."""
    return backend if cpu_accuracy == "auto" else f"{backend} ({cpu_accuracy})"


def _fastest(bundle: Bundle | None) -> tuple[str, tuple[str, ...]]:
    """Return a backend's name and, if there is a GPU but the bundle's engines are not used, a note that says why."""
    found, notes = _fastest_on_gpu(bundle) if machine.cuda_problem() is None else (None, ())
    if found is None and bundle is not None and find_spec("onnxruntime") is None:
        found = installed_backend()  # loading it reports what is missing
    return found or "onnxruntime", notes


def _fastest_on_gpu(bundle: Bundle | None) -> tuple[str | None, tuple[str, ...]]:
    """Return the same of the backends for a GPU; engines first, because somebody took the time to build them."""
    notes: tuple[str, ...] = ()
    if bundle is not None:
        from trio_edge.runtime.backends.tensorrt import engines_that_run

        found, reason = engines_that_run(bundle)
        if found is not None:
            return found, notes
        notes = () if reason is None else (f"engines are not used: {reason}",)
    if find_spec("onnxruntime") is not None:
        from trio_edge.runtime.backends.onnxruntime import has_provider

        if has_provider("onnxruntime-cuda"):
            return "onnxruntime-cuda", notes
    return None, notes
