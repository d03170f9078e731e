"""Sums layers by operator, and leaves only the slowest of them for the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.runtime.profiling.report import OperatorTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.profiling.report import LayerTime, Phase

SLOWEST = 10
"""Layers that are kept of each graph in each phase."""


def operator_times(layers: Sequence[LayerTime]) -> tuple[OperatorTime, ...]:
    """Return the sum of each kind of layer in each graph and phase, the slowest first."""
    found: dict[tuple[str, Phase, str], list[LayerTime]] = {}
    for layer in layers:
        found.setdefault((layer.graph, layer.phase, layer.kind), []).append(layer)
    sums = [
        OperatorTime(
            graph=graph,
            phase=phase,
            kind=kind,
            layers=len(parts),
            answer_ms=sum(part.answer_ms for part in parts),
        )
        for (graph, phase, kind), parts in found.items()
    ]
    return tuple(sorted(sums, key=lambda one: -one.answer_ms))


def slowest_layers(layers: Sequence[LayerTime]) -> tuple[LayerTime, ...]:
    """Return the ``SLOWEST`` layers of each graph in each phase, the slowest first."""
    kept: list[LayerTime] = []
    counts: dict[tuple[str, Phase], int] = {}
    for layer in sorted(layers, key=lambda one: -one.answer_ms):
        key = (layer.graph, layer.phase)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= SLOWEST:
            kept.append(layer)
    return tuple(kept)
