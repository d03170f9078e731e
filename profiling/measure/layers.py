"""Time of each layer, from the backend's profiler, summed per answer and per operator."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from trio_edge.profiling.measure.recording import is_decode

if TYPE_CHECKING:
    from collections.abc import Sequence

Phase = Literal["prefill", "decode"]
SLOWEST = 10
"""Layers to report per graph and phase."""
_RUN, _NODE_END = "model_run", "_kernel_time"


class LayerTime(msgspec.Struct, frozen=True, kw_only=True):
    """One layer or node of a graph, under the backend's name."""

    graph: str
    phase: Phase
    name: str
    kind: str
    answer_ms: float
    """Median time of a run, times the runs per answer, under the backend's profiler."""
    calls_per_answer: float
    shapes: str


class OperatorTime(msgspec.Struct, frozen=True, kw_only=True):
    """All layers of one kind in a graph."""

    graph: str
    phase: Phase
    kind: str
    layers: int
    answer_ms: float


class LayerCall(NamedTuple):
    """One layer in one run of its graph."""

    name: str
    kind: str
    milliseconds: float
    shapes: str
    """Shapes of the inputs."""


def layer_times(
    runs: Sequence[Sequence[LayerCall]], *, graph: str, profiles: Sequence[str], num_answers: int
) -> list[LayerTime]:
    """Return all layers of one graph with their time per answer, in the order of their first run.

    ``runs`` has the layers of each run of ``num_answers`` answers, and ``profiles`` the profile of each run.
    """
    found: dict[tuple[Phase, str], list[LayerCall]] = {}
    for calls, profile in zip(runs, profiles, strict=True):
        phase: Phase = "decode" if is_decode(profile) else "prefill"
        for call in calls:
            found.setdefault((phase, call.name), []).append(call)
    return [
        LayerTime(
            graph=graph,
            phase=phase,
            name=name,
            kind=calls[0].kind,
            # the median, because one interruption could put any layer among the slowest
            answer_ms=statistics.median(call.milliseconds for call in calls) * len(calls) / num_answers,
            calls_per_answer=len(calls) / num_answers,
            shapes=calls[0].shapes,
        )
        for (phase, name), calls in found.items()
    ]


def operator_times(layers: Sequence[LayerTime]) -> tuple[OperatorTime, ...]:
    """Return the sums over layers of one kind, graph and phase, the slowest first."""
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
    """Return the ``SLOWEST`` layers of each graph and phase, the slowest first."""
    kept: list[LayerTime] = []
    for layer in sorted(layers, key=lambda one: -one.answer_ms):
        if sum((one.graph, one.phase) == (layer.graph, layer.phase) for one in kept) < SLOWEST:
            kept.append(layer)
    return tuple(kept)


def layer_runs(written: Any) -> list[list[LayerCall]]:
    """Return the layers of each run of one graph, in order.

    ``written`` is the JSON of the backend's profiler: ONNX Runtime's list of trace events, or the dictionary that
    ``trio_edge.runtime.engines.package`` writes for a TensorRT engine.
    """
    return _runs_of_trace(written) if isinstance(written, list) else _runs_of_engine(written)


def _runs_of_trace(events: Sequence[dict[str, Any]]) -> list[list[LayerCall]]:
    """Read Chrome trace events: "model_run" is a run, an event of category "Node" a node's kernel."""
    starts = sorted(event["ts"] for event in events if event["name"] == _RUN)
    runs: list[list[LayerCall]] = [[] for _ in starts]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_NODE_END):
            details = event["args"]
            call = LayerCall(
                name=event["name"].removesuffix(_NODE_END),
                kind=details.get("op_name", ""),
                milliseconds=event["dur"] / 1e3,
                shapes=_input_shapes(details.get("input_type_shape", ())),
            )
            # the trace has no link from a node to its run, but a run's nodes begin within it
            runs[bisect_right(starts, event["ts"]) - 1].append(call)
    return runs


def _input_shapes(tensors: Sequence[dict[str, list[int]]]) -> str:
    """Return inputs as ``float[1,224,128] int64[1]``."""
    return " ".join(
        f"{dtype}[{','.join(map(str, shape))}]" for tensor in tensors for dtype, shape in tensor.items()
    )


def _runs_of_engine(written: dict[str, Any]) -> list[list[LayerCall]]:
    """Read {"runs": [[[name, milliseconds], …], …], "layers": the inspector's list}."""
    # an engine built without trio-build --verbose-layers lists only names; kinds and shapes stay empty
    details = {layer["Name"]: layer for layer in written["layers"] if isinstance(layer, dict)}
    return [
        [_engine_call(name, milliseconds, details.get(name, {})) for name, milliseconds in run]
        for run in written["runs"]
    ]


def _engine_call(name: str, milliseconds: float, details: dict[str, Any]) -> LayerCall:
    shapes = " ".join(
        f"{tensor.get('Format/Datatype', tensor.get('Format', ''))}{tensor.get('Dimensions', '')}"
        for tensor in details.get("Inputs", ())
    )
    return LayerCall(name=name, kind=details.get("LayerType", ""), milliseconds=milliseconds, shapes=shapes)
