"""A graph whose pieces are loaded separately, as one engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile
    from trio_edge.runtime.devices.interface import DeviceTensor, Engine, PreparedLaunch


@final
class PiecedEngine:
    """A graph with one engine for each of its pieces."""

    def __init__(self, spec: GraphSpec, pieces: Sequence[Engine]) -> None:
        self.spec, self._pieces = spec, pieces

    def prepare(self, profile: Profile, tensors: Mapping[str, DeviceTensor]) -> PreparedLaunch:
        """Bind a profile of a piece to addresses; the other pieces' tensors have no elements."""
        piece = next(piece for piece in self._pieces if profile in piece.spec.profiles)
        return piece.prepare(profile, {tensor.name: tensors[tensor.name] for tensor in piece.spec.tensors})

    def close(self) -> None:
        """Close all engines."""
        for piece in self._pieces:
            piece.close()
