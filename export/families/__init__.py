"""Model families: one small module each, behind the interface in ``base``. To add one, write it and list it here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.export.families.llava import Llava
from trio_edge.export.families.llava_next import LlavaNext
from trio_edge.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from trio_edge.export.checkpoint import Checkpoint
    from trio_edge.export.families.base import Family

__all__ = ["FAMILIES", "family_of"]

FAMILIES: tuple[Family, ...] = (Llava(), LlavaNext())


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family that ``checkpoint`` belongs to.

    Raises:
        CheckpointError: If no family exports this architecture.
    """
    model_type = checkpoint.config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise CheckpointError(
        f"{checkpoint.folder}: expected model_type {known}, got {model_type!r}; this architecture cannot be exported"
    )
