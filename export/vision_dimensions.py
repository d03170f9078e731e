"""A family's vision sizes as the manifest holds them: without the numbers that differ from picture to picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.manifest import VisionDimensions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.export.families.base import FamilyModel


def vision_dimensions(model: FamilyModel, *, sizes: Mapping[str, int], hidden_size: int) -> VisionDimensions:
    """Return the sizes of ``model``'s vision tower and projector.

    Args:
        model: The family's.
        sizes: Of any profile of the vision graph.
        hidden_size: D, of the decoder.
    """
    shape, patches = model.vision_shape(sizes), "P" in sizes
    projected, projector = shape.projected_tokens, shape.projector_weights
    if projector is None:
        projector = (shape.hidden_size + hidden_size) * hidden_size
    return VisionDimensions(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        patches_per_tile=None if patches else shape.patches_per_tile,
        projector_weights=projector,
        mlp_matrices=shape.mlp_matrices,
        patches_per_window=shape.patches_per_window,
        num_full_layers=shape.num_full_layers,
        projected_per_tile=None if patches or projected is None else projected // shape.num_tiles,
        patches_per_token=sizes["P"] // projected if patches and projected is not None else None,
        merged_weights=2 * shape.merged_into * hidden_size,
    )
