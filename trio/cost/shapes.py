"""Elements of a model's matrices, counted from its dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import Dimensions, VisionDimensions


def tiles_and_patches(tower: VisionDimensions, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the number of tiles and of patches in each, for the sizes of a vision profile."""
    if tower.patches_per_tile is None:
        return 1, sizes["P"]
    return sizes["B"], tower.patches_per_tile


def tower_weights(tower: VisionDimensions) -> int:
    """Return the elements of the vision tower's and the projector's matrices."""
    width = tower.hidden_size
    layer = 4 * width**2 + tower.mlp_matrices * width * tower.intermediate_size
    return tower.num_layers * layer + tower.projector_weights


def layer_weights(decoder: Dimensions) -> int:
    """Return the elements of one decoder layer's matrices."""
    return sum(inputs * outputs for inputs, outputs in layer_matrices(decoder))


def layer_matrices(decoder: Dimensions) -> tuple[tuple[int, int], ...]:
    """Return inputs and outputs of one decoder layer's matrices: queries, keys, values, output, gate, up, down."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    queries = decoder.num_heads * decoder.head_size
    keys = decoder.num_kv_heads * decoder.head_size
    return (
        (hidden, queries),
        (hidden, keys),
        (hidden, keys),
        (queries, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    )
