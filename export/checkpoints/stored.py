"""The names and places of the arrays in a bundle's weight files.

A weight has a name in the checkpoint's files, a canonical name (``canonical_name``), and an initializer name in each graph
that reads it. A bundle can store it in several forms; ``StoredName`` names one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import StoredTensor


class Change(Enum):
    """A difference between a checkpoint's tensor and a stored array; its value is part of the array's name."""

    ROWS = "rows"
    """A table of rows, which is not transposed; other weights are."""
    SMOOTHED = "smoothed"
    """Multiplied by the factors of a calibration."""
    UNPACKED = "unpacked"
    """Floating point, from the checkpoint's integers."""
    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"
    SCALE = "scale"
    """The scales instead of the values."""


@dataclass(frozen=True, slots=True)
class StoredName:
    """Identifies one array of a bundle."""

    tensor: str
    """Canonical name in the checkpoint; for a graph's constant, the names of graph and constant."""
    changes: tuple[Change, ...] = ()
    """In the order of ``Change``; empty for the checkpoint's own values."""

    @property
    def scales(self) -> StoredName:
        """Name of this array's scales."""
        return StoredName(self.tensor, (*self.changes, Change.SCALE))

    def __str__(self) -> str:
        """Return the name in the safetensors file."""
        return ".".join([self.tensor, *(change.value for change in self.changes)])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """The written arrays, and the hashes of their files."""

    tensors: dict[StoredName, StoredTensor]
    sha256: dict[str, str]
    """SHA-256 of every file, by its path in the bundle."""

    def with_more(self, other: StoredWeights) -> StoredWeights:
        """Return the arrays and files of both."""
        return StoredWeights(tensors=self.tensors | other.tensors, sha256=self.sha256 | other.sha256)
