"""The names of the arrays in a bundle's weight files, and where each array lies.

One weight has a name in the checkpoint's files, one canonical name (``canonical_name``), and one initializer name in each
graph that reads it. A bundle can store it in several forms, so there it goes by ``StoredName``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import StoredTensor


class Change(Enum):
    """A difference between a checkpoint's tensor and a stored array; the value is what the array's name says of it."""

    ROWS = "rows"
    """A table of rows, stored as it lies: other weights are transposed."""
    SMOOTHED = "smoothed"
    """With the factors of a calibration."""
    UNPACKED = "unpacked"
    """Floating point where the checkpoint has integers."""
    INT4 = "int4"
    INT8 = "int8"
    FP8 = "fp8"
    SCALE = "scale"
    """The scales, not the values."""


@dataclass(frozen=True, slots=True)
class StoredName:
    """Identifies one array of a bundle."""

    tensor: str
    """Canonical name in the checkpoint; for a constant of one graph, that graph's name and the constant's."""
    changes: tuple[Change, ...] = ()
    """In the order of ``Change``; none for the checkpoint's own values."""

    @property
    def scales(self) -> StoredName:
        """The name of the scales that belong to this array."""
        return StoredName(self.tensor, (*self.changes, Change.SCALE))

    def __str__(self) -> str:
        """Return the name in the safetensors file."""
        return ".".join([self.tensor, *(change.value for change in self.changes)])


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """The arrays that were written, and the files that hold them."""

    tensors: dict[StoredName, StoredTensor]
    sha256: dict[str, str]
    """Hash of every file, by its path in the bundle."""

    def with_more(self, other: StoredWeights) -> StoredWeights:
        """Return the arrays and files of both."""
        return StoredWeights(tensors=self.tensors | other.tensors, sha256=self.sha256 | other.sha256)
