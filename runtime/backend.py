"""The interface of a backend, what all backends check, and the choice of one by name.

A backend loads a bundle's graphs onto a device: see ``trio_edge.runtime.device`` for what it gives.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

from trio_edge.runtime.device import shape_at
from trio_edge.runtime.engine_package import ENGINE_BACKENDS, installed_backend
from trio_edge.runtime.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from trio_edge.runtime.bundle import Bundle
    from trio_edge.runtime.device import DeviceTensor, LoadedGraphs
    from trio_edge.runtime.manifest import GraphSpec, Profile

OnnxRuntimeName = Literal["onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime"]
_ONNX_RUNTIMES: tuple[OnnxRuntimeName, ...] = ("onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime")
BACKENDS = (*ENGINE_BACKENDS, *_ONNX_RUNTIMES)
BACKENDS_HELP = (
    "auto, or one of tensorrt, tensorrt-rtx (engines from trio-build), onnxruntime-tensorrt, onnxruntime-cuda,"
    " onnxruntime (CPU)."
)


class Backend(Protocol):
    """Loads graphs."""

    @property
    def name(self) -> str:
        """Name for messages and statistics."""

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Return graphs of a bundle on a device of their own.

        Args:
            bundle: An opened bundle.
            names: Which graphs; None means all.

        Raises:
            BackendError: If a graph cannot be loaded or is not what the manifest says, or the device has not enough memory.
        """


def make_backend(
    name: str = "auto",
    *,
    bundle: Bundle | None = None,
    threads: int = 0,
    layer_times: Path | None = None,
) -> Backend:
    """Return the backend called ``name``; for "auto" the fastest that can run ``bundle`` here.

    "auto" takes the bundle's TensorRT engines if they fit this machine, else ONNX Runtime's CUDA provider if there is a
    GPU, else ONNX Runtime on the CPU.

    Args:
        name: "auto" or one of ``BACKENDS``.
        bundle: What is to be run; without it "auto" takes no engines.
        threads: CPU threads for one graph; 0 lets the backend choose.
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
            from trio_edge.runtime.backend_tensorrt import TensorRTBackend

            return TensorRTBackend(engine_backend, layer_times=layer_times)
    onnx_runtime = next((known for known in _ONNX_RUNTIMES if known == name), None)
    if onnx_runtime is None:
        raise BackendError(
            f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}; choose one of them"
        )
    if find_spec("onnxruntime") is None:
        raise BackendError(
            'backend: expected onnxruntime to be installed, it is not; run pip install "trio-edge[ort]"'
        )
    from trio_edge.runtime.backend_onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(onnx_runtime, threads=threads, layer_times=layer_times, notes=notes)


def _fastest(bundle: Bundle | None) -> tuple[str, tuple[str, ...]]:
    """Return a backend's name, and as a note why it is not that of the bundle's engines although there is a GPU."""
    from trio_edge.runtime.device_cuda import cuda_problem

    notes: tuple[str, ...] = ()
    if cuda_problem() is None:
        if bundle is not None:
            from trio_edge.runtime.backend_tensorrt import engines_that_run

            found, reason = engines_that_run(bundle)
            if found is not None:
                return found, notes
            if reason is not None:
                notes = (f"engines are not used: {reason}",)
        if find_spec("onnxruntime") is not None:
            from trio_edge.runtime.backend_onnxruntime import has_provider

            if has_provider("onnxruntime-cuda"):
                return "onnxruntime-cuda", notes
    if bundle is not None and find_spec("onnxruntime") is None:
        return installed_backend() or "onnxruntime", notes  # it says what keeps it from running
    return "onnxruntime", notes


def selected_graphs(bundle: Bundle, names: Sequence[str] | None) -> list[GraphSpec]:
    """Return the entries of the graphs called ``names``, in the manifest's order; None means all.

    Raises:
        BackendError: If the bundle has no such graph.
    """
    graphs = bundle.manifest.graphs
    known = [spec.name for spec in graphs]
    if unknown := [name for name in names or () if name not in known]:
        raise BackendError(
            f"{bundle.folder}: expected one of the graphs {', '.join(known)}, got {unknown[0]!r}; choose one of them"
        )
    return [spec for spec in graphs if names is None or spec.name in names]


def check_tensors(spec: GraphSpec, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> None:
    """Raise ShapeError unless ``tensors`` are exactly the inputs and outputs of ``spec`` in name, dtype and shape."""
    expected = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ShapeError(f"{spec.name}: expected the tensors {', '.join(list(expected)[:5])}…, odd are {odd}")
    for name, tensor in expected.items():
        shape, got = shape_at(tensor.shape, profile), tensors[name]
        if got.dtype != tensor.dtype or got.shape != shape:
            raise ShapeError(
                f"{spec.name} {name!r}: expected {tensor.dtype} {list(shape)} in profile {profile.name}, got"
                f" {got.dtype} {list(got.shape)}"
            )
