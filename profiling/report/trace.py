"""A measurement as a Chrome trace: one process per bundle with its answers and graphs, and sensors as counters.

chrome://tracing and ui.perfetto.dev open the file. Format: "Trace Event Format", events X (complete), C (counter), M (names).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.profiling.measure.answers import Answer
    from trio_edge.profiling.measure.measuring import Measurement
    from trio_edge.profiling.report.profile import ProfileReport

_ANSWERS, _GRAPHS = 1, 2
_SENSOR_PROCESS = 0


def trace_json(measurement: Measurement, report: ProfileReport) -> bytes:
    """Return the trace of all timed answers; the report has the bundles' labels."""
    origin = min(one.answers[0].start for one in measurement.measured)
    last = max(one.answers[-1].end for one in measurement.measured)
    events: list[dict[str, Any]] = [_name("process_name", _SENSOR_PROCESS, 0, "sensors")]
    for sample in measurement.samples:
        if origin <= sample.seconds <= last:
            for name, value in sample.readings.items():
                events.append(
                    {
                        "ph": "C",
                        "name": name,
                        "pid": _SENSOR_PROCESS,
                        "ts": _nanoseconds(sample.seconds - origin) / 1e3,
                        "args": {"value": value},
                    }
                )
    for index, (measured, profile) in enumerate(zip(measurement.measured, report.bundles)):
        process, label = index + 1, profile.label
        events += [
            _name("process_name", process, 0, label),
            _name("thread_name", process, _ANSWERS, "answers"),
            _name("thread_name", process, _GRAPHS, "graphs"),
        ]
        for number, answer in enumerate(measured.answers):
            events += _answer_events(answer, number, process=process, origin=origin)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()


def _answer_events(answer: Answer, number: int, *, process: int, origin: float) -> Iterator[dict[str, Any]]:
    moments = [answer.start, *answer.token_moments]
    for index, (start, end) in enumerate(zip(moments, moments[1:])):
        name = "first token" if index == 0 else "token"
        token = {"answer": number, "token": index, "id": answer.token_ids[index]}
        yield _complete(name, process, _ANSWERS, start - origin, end - origin, token)
    for call in answer.calls:
        launch = {"answer": number, "profile": call.profile}
        yield _complete(call.graph, process, _GRAPHS, call.start - origin, call.end - origin, launch)


def _complete(
    name: str, process: int, thread: int, start: float, end: float, args: dict[str, Any]
) -> dict[str, Any]:
    """Return a slice with both ends in whole nanoseconds: Perfetto drops slices that overlap by rounding."""
    begin = _nanoseconds(start)
    return {
        "ph": "X",
        "name": name,
        "pid": process,
        "tid": thread,
        "ts": begin / 1e3,
        "dur": (_nanoseconds(end) - begin) / 1e3,
        "args": args,
    }


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _nanoseconds(seconds: float) -> int:
    return round(1e9 * seconds)
