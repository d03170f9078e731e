"""The interface of a backend, and the checks that all backends share.

A backend loads a bundle's graphs onto a device; ``trio_edge.runtime.devices.interface`` describes the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import LoadedGraphs

OnnxRuntimeName = Literal["onnxruntime-tensorrt", "onnxruntime-cuda", "onnxruntime"]


class Backend(Protocol):
    """Loads graphs onto a device."""

    @property
    def name(self) -> str:
        """Name for messages and statistics."""

    def load(self, bundle: Bundle, names: Sequence[str] | None = None) -> LoadedGraphs:
        """Load the graphs called ``names`` onto a device of their own; None means all graphs.

        Raises:
            BackendError: If a graph cannot be loaded or differs from the manifest, or the device has too little memory.
        """


def selected_graphs(bundle: Bundle, names: Sequence[str]) -> tuple[GraphSpec, ...]:
    """Return the manifest entries of the graphs called ``names``, in the manifest's order.

    Raises:
        BackendError: If the bundle has no such graph.
    """
    graphs = bundle.manifest.graphs
    known = [spec.name for spec in graphs]
    if unknown := [name for name in names if name not in known]:
        raise BackendError(
            f"{bundle.folder}: expected one of the graphs {', '.join(known)}, got {unknown[0]!r}; choose one of them"
        )
    return tuple(spec for spec in graphs if spec.name in names)
