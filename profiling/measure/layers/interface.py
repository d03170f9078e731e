"""What a backend's own profiler says of a graph's layers: read per run, summed per answer and by operator."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from trio_edge.profiling.measure.recording import DECODE
from trio_edge.profiling.report.profile import LayerTime, OperatorTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.report.profile import Phase

SLOWEST = 10
"""Layers that are kept of each graph in each phase."""


class LayerCall(NamedTuple):
    """One layer in one run of its graph."""

    name: str
    kind: str
    """Operator, in the backend's words."""
    milliseconds: float
    shapes: str
    """Of its inputs, as text."""


def layer_times(
    runs: Sequence[Sequence[LayerCall]], *, graph: str, profiles: Sequence[str], num_answers: int
) -> list[LayerTime]:
    """Return every layer of one graph with its time in an answer, in the order in which they first ran.

    That is the median of its runs as often as it ran: in the mean, one interruption would put any layer among the slowest.

    Args:
        runs: The layers of each run.
        graph: Its name.
        profiles: The profile of each run.
        num_answers: That the runs were for.
    """
    found: dict[tuple[Phase, str], list[LayerCall]] = {}
    for calls, profile in zip(runs, profiles, strict=True):
        phase: Phase = "decode" if profile == DECODE else "prefill"
        for call in calls:
            found.setdefault((phase, call.name), []).append(call)
    return [
        LayerTime(
            graph=graph,
            phase=phase,
            name=name,
            kind=calls[0].kind,
            answer_ms=statistics.median(call.milliseconds for call in calls) * len(calls) / num_answers,
            calls_per_answer=len(calls) / num_answers,
            shapes=calls[0].shapes,
        )
        for (phase, name), calls in found.items()
    ]


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
