"""The interface of a backend, the check of its inputs, and the choice of one by name.

A backend loads one graph into a ``Session``; a session runs on named I/O tensors. That is all a backend must do.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from trio_edge.runtime.errors import BackendError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.manifest import GraphSpec

BACKENDS = ("onnxruntime",)
"""In the order in which "auto" tries them."""


class Session(Protocol):
    """One loaded graph."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name.

        Args:
            inputs: Exactly the graph's inputs by name, with its dtypes and shapes.

        Raises:
            ShapeError: If an input is missing, unknown, or of another dtype or shape.
            BackendError: If the backend fails while running.
        """

    def close(self) -> None:
        """Release everything; the session cannot run afterwards."""


class Backend(Protocol):
    """Loads graphs."""

    @property
    def name(self) -> str:
        """Name for messages and statistics."""

    def load(self, folder: Path, spec: GraphSpec) -> Session:
        """Return a session of the graph ``spec`` of the bundle in ``folder``.

        Raises:
            BackendError: If the graph cannot be loaded, or is not what the manifest says.
        """


def make_backend(name: str = "auto", *, threads: int = 0) -> Backend:
    """Return the backend called ``name``, or the first installed one for "auto".

    Args:
        name: "auto" or one of ``BACKENDS``.
        threads: CPU threads for one graph; 0 lets the backend choose.

    Raises:
        BackendError: If there is no such backend, or its package is not installed.
    """
    if name not in ("auto", *BACKENDS):
        raise BackendError(
            f"backend: expected one of auto, {', '.join(BACKENDS)}, got {name!r}; choose one of them"
        )
    if find_spec("onnxruntime") is None:
        raise BackendError(
            'backend: expected onnxruntime to be installed, it is not; run pip install "trio-edge[ort]"'
        )
    from trio_edge.runtime.backend_onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(threads=threads)


def check_inputs(spec: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Raise ShapeError unless ``inputs`` are exactly the inputs of ``spec`` in name, dtype and shape.

    A symbol in the shapes must have one value over all inputs.
    """
    if inputs.keys() != set(spec.input_names):
        missing = [name for name in spec.input_names if name not in inputs]
        unknown = [name for name in inputs if name not in spec.input_names]
        raise ShapeError(
            f"{spec.name}: expected inputs {', '.join(spec.input_names[:5])}…, missing {missing}, unknown {unknown}"
        )
    symbols: dict[str, int] = {}
    for tensor in spec.inputs:
        array = inputs[tensor.name]
        fits = len(array.shape) == len(tensor.shape) and all(
            (symbols.setdefault(size, axis) if isinstance(size, str) else size) == axis
            for size, axis in zip(tensor.shape, array.shape)
        )
        if array.dtype != tensor.dtype or not fits:
            raise ShapeError(
                f"{spec.name} input {tensor.name!r}: expected {tensor.dtype} {list(tensor.shape)}"
                f" with {symbols}, got {array.dtype} {list(array.shape)}"
            )
