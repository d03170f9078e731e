"""Reads the trace of ONNX Runtime's own profiler: how long each node of a graph took in each run.

Format: Chrome trace events; those of category "Session" called "model_run" are the runs, those of category "Node" whose names
end in "_kernel_time" the nodes. A run's nodes begin within it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.profiling.recording import DECODE
from trio_edge.runtime.profiling.report import LayerTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.profiling.report import Phase

_RUN, _NODE_END = "model_run", "_kernel_time"


def layer_times(
    events: Sequence[dict[str, Any]], *, graph: str, profiles: Sequence[str], num_answers: int, skip: int
) -> list[LayerTime]:
    """Return every node of one graph with its mean time in an answer, in the order in which they first ran.

    Args:
        events: The trace of one session.
        graph: Its graph's name.
        profiles: The profile of each run, in order.
        num_answers: That the runs after ``skip`` were for.
        skip: Runs at the beginning that do not count.
    """
    starts = sorted(event["ts"] for event in events if event["name"] == _RUN)
    found: dict[tuple[Phase, str], list[dict[str, Any]]] = {}
    for event in events:
        name = event["name"]
        run = bisect_right(starts, event["ts"]) - 1
        if event.get("cat") == "Node" and name.endswith(_NODE_END) and run >= skip:
            phase: Phase = "decode" if profiles[run] == DECODE else "prefill"
            found.setdefault((phase, name.removesuffix(_NODE_END)), []).append(event)
    return [
        LayerTime(
            graph=graph,
            phase=phase,
            name=name,
            kind=calls[0]["args"].get("op_name", ""),
            answer_ms=sum(call["dur"] for call in calls) / 1e3 / num_answers,
            calls_per_answer=len(calls) / num_answers,
            shapes=_shapes(calls[0]["args"].get("input_type_shape", ())),
        )
        for (phase, name), calls in found.items()
    ]


def _shapes(tensors: Sequence[dict[str, list[int]]]) -> str:
    """Return inputs as text: ``float[1,224,128] int64[1]``."""
    return " ".join(
        f"{dtype}[{','.join(map(str, shape))}]" for tensor in tensors for dtype, shape in tensor.items()
    )
