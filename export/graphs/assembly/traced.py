"""A graph between its tracing and its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.graph_io import is_probe

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

    from trio_edge.export.checkpoints.stored import StoredName
    from trio_edge.runtime.bundle.manifest import GraphSpec, PieceName


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedGraph:
    """A graph without weights, and the source of each initializer."""

    spec: GraphSpec
    """Description, with ``weight_bytes`` still 0."""
    model: ir.Model
    weights: dict[str, StoredName]
    """Initializer name -> array in the bundle."""
    constants: dict[str, NDArray[Any]]
    """Initializer name -> values computed by the export."""
    piece: PieceName | None = None
    """Set if ``assembly/pieces.py`` joins the graph with others; all have the joined graph's name."""

    @property
    def is_probe(self) -> bool:
        """Whether it is a piece of a probe, which reads weights of other roles, and in both directions."""
        return is_probe(self.spec)
