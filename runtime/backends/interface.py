"""The interface of a backend, and the checks that all backends share.

A backend loads a bundle's graphs onto a device; ``trio_edge.runtime.devices.interface`` describes the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.bundle.manifest import shape_at

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.bundle.reader import Bundle
    from trio_edge.runtime.devices.interface import DeviceTensor, LoadedGraphs

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


def selected_graphs(bundle: Bundle, names: Sequence[str] | None) -> list[GraphSpec]:
    """Return the manifest entries of the graphs called ``names``, in the manifest's order; None means all.

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
    """Raise ShapeError unless ``tensors`` match the inputs and outputs of ``spec`` in name, dtype and shape."""
    expected = {tensor.name: tensor for tensor in spec.tensors}
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ShapeError(
            f"{spec.name}: expected the tensors {', '.join(list(expected)[:5])}…, got others or too few: {odd}; bind exactly these"
        )
    for name, tensor in expected.items():
        shape, got = shape_at(tensor.shape, profile), tensors[name]
        if got.dtype != tensor.dtype or got.shape != shape:
            raise ShapeError(
                f"{spec.name} {name!r}: expected {tensor.dtype} {list(shape)} in profile {profile.name}, got"
                f" {got.dtype} {list(got.shape)}"
            )
