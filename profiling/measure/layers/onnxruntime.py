"""Reads the trace of ONNX Runtime's own profiler: how long each node of a graph took in each run.

Format: Chrome trace events; those of category "Session" called "model_run" are the runs, those of category "Node" whose names
end in "_kernel_time" the nodes. A run's nodes begin within it.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from trio_edge.profiling.measure.layers.interface import LayerCall

if TYPE_CHECKING:
    from collections.abc import Sequence

_RUN, _NODE_END = "model_run", "_kernel_time"


def runs_of_trace(events: Sequence[dict[str, Any]]) -> list[list[LayerCall]]:
    """Return the nodes of each run, in order.

    Args:
        events: The trace of one session.
    """
    starts = sorted(event["ts"] for event in events if event["name"] == _RUN)
    runs: list[list[LayerCall]] = [[] for _ in starts]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_NODE_END):
            details = event["args"]
            call = LayerCall(
                name=event["name"].removesuffix(_NODE_END),
                kind=details.get("op_name", ""),
                milliseconds=event["dur"] / 1e3,
                shapes=_shapes(details.get("input_type_shape", ())),
            )
            runs[bisect_right(starts, event["ts"]) - 1].append(call)
    return runs


def _shapes(tensors: Sequence[dict[str, list[int]]]) -> str:
    """Return inputs as text: ``float[1,224,128] int64[1]``."""
    return " ".join(
        f"{dtype}[{','.join(map(str, shape))}]" for tensor in tensors for dtype, shape in tensor.items()
    )
