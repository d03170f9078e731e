"""The choice of a backend, by name or for this machine. A backend's package is imported only when it is chosen."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from trio_edge.runtime.bundle.errors import BackendError
from trio_edge.runtime.bundle.limits import is_whole
from trio_edge.runtime.engines.package import ENGINE_BACKENDS, installed_backend

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.backends.interface import Backend, CpuAccuracy, OnnxRuntimeName
    from trio_edge.runtime.bundle.reader import Bundle

_ONNX_RUNTIMES: tuple[OnnxRuntimeName, ...] = ("onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime")
# Each graph has as many threads of its own; where the system gives no more, onnxruntime waits for them without end.
_MOST_THREADS = 16
BACKENDS = (*ENGINE_BACKENDS, *_ONNX_RUNTIMES)
CPU_ACCURACIES: tuple[CpuAccuracy, ...] = ("auto", "float32", "int8")
BACKENDS_HELP = (
    "auto, or one of tensorrt, tensorrt-rtx (engines from trio-build), onnxruntime-tensorrt, onnxruntime-cuda,"
    " onnxruntime (CPU)."
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
        bundle: What is to be run; without it "auto" takes no engines.
        threads: CPU threads for one graph; 0 lets the backend choose.
        cpu_accuracy: What ONNX Runtime rounds the inputs of products with INT4 and INT8 weights to on the CPU. "int8" takes a
            third of the time of "float32"; "auto" takes it for graphs so large that this shows.
        cuda_graph: Whether engines of TensorRT are captured for decode; False to find out whether capturing is to blame.
        layer_times: Folder into which each graph, when it is closed, writes what its layers took in every run, as the
            backend's own profiler says it: ``<graph>.json``. It slows the graphs down.

    Raises:
        BackendError: If there is no such backend, or something that it needs is missing.
    """
    notes: tuple[str, ...] = ()
    if name == "auto":
        name, notes = _fastest(bundle)
    for engine_backend in ENGINE_BACKENDS:
        if name == engine_backend:
            from trio_edge.runtime.backends.tensorrt import TensorRTBackend

            return TensorRTBackend(engine_backend, cuda_graph=cuda_graph, layer_times=layer_times)
    onnx_runtime = next((known for known in _ONNX_RUNTIMES if known == name), None)
    if onnx_runtime is None:
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
            f"threads: expected 0..{most} (no more than processors help), got {threads!r:.80}; 0 lets the backend choose"
        )
    if find_spec("onnxruntime") is None:
        raise BackendError(
            'backend: expected onnxruntime to be installed, it is not; run pip install "trio-edge[ort]"'
        )
    from trio_edge.runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(
        onnx_runtime, threads=threads, cpu_accuracy=cpu_accuracy, layer_times=layer_times, notes=notes
    )


def with_accuracy(backend: str, cpu_accuracy: CpuAccuracy) -> str:
    """Return what to call a backend in a report, where it is told how exactly to compute."""
    return backend if cpu_accuracy == "auto" else f"{backend} ({cpu_accuracy})"


def _fastest(bundle: Bundle | None) -> tuple[str, tuple[str, ...]]:
    """Return a backend's name, and as a note why it is not that of the bundle's engines although there is a GPU."""
    from trio_edge.runtime.devices.cuda import cuda_problem

    notes: tuple[str, ...] = ()
    # Engines first: somebody took the time to build them.
    if cuda_problem() is None:
        if bundle is not None:
            from trio_edge.runtime.backends.tensorrt import engines_that_run

            found, reason = engines_that_run(bundle)
            if found is not None:
                return found, notes
            if reason is not None:
                notes = (f"engines are not used: {reason}",)
        if find_spec("onnxruntime") is not None:
            from trio_edge.runtime.backends.onnxruntime import has_provider

            if has_provider("onnxruntime-cuda"):
                return "onnxruntime-cuda", notes
    if bundle is not None and find_spec("onnxruntime") is None:
        return installed_backend() or "onnxruntime", notes  # it says what keeps it from running
    return "onnxruntime", notes
