"""Random inputs for one graph of a bundle; times do not depend on their values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trio_edge.trio.cost.bundle_work import fixed_sizes

if TYPE_CHECKING:
    from trio_edge.runtime.bundle.manifest import GraphSpec, Profile

COUNTS = {
    "num_visual": "N",
    "length": "S",
    "past_length": "C",
    "probe_length": "PS",
    "gradient_num_visual": "GN",
}


def inputs_for(graph: GraphSpec, profile: Profile) -> dict[str, Any]:
    """Return inputs for one profile: no padding, visual tokens first, KV buffers full."""
    sizes, random, values = {**fixed_sizes(graph), **profile.sizes}, np.random.default_rng(0), {}
    for tensor in graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in tensor.shape]
        if tensor.name in COUNTS:
            value: Any = np.array([sizes[COUNTS[tensor.name]]])
        elif tensor.name in ("token_index", "table_index", "last_row"):
            value = np.zeros(shape)
        elif tensor.dtype == "int32":  # positions and rows: within what they index
            value = np.broadcast_to(np.arange(shape[-1]) % max(shape[-1] - 1, 1), shape)
        else:
            value = random.standard_normal(shape, dtype=np.float32)
        values[tensor.name] = value.astype(tensor.dtype)
    return values
