"""Reads what an engine's profiler and inspector said: how long each of its layers took in each run, and what they are.

Format, of ``trio_edge.runtime.engines.log``: {"runs": [[[name, milliseconds], …], …], "layers": the inspector's list}. An
engine that was built without ``trio-build --verbose-layers`` lists names only; kinds and shapes are empty then.
"""

from __future__ import annotations

from typing import Any

from trio_edge.profiling.measure.layers.interface import LayerCall


def runs_of_engine(written: dict[str, Any]) -> list[list[LayerCall]]:
    """Return the layers of each run, in order."""
    details = {layer["Name"]: layer for layer in written["layers"] if isinstance(layer, dict)}
    return [
        [_call(name, milliseconds, details.get(name, {})) for name, milliseconds in run]
        for run in written["runs"]
    ]


def _call(name: str, milliseconds: float, details: dict[str, Any]) -> LayerCall:
    shapes = " ".join(
        f"{tensor.get('Format/Datatype', tensor.get('Format', ''))}{tensor.get('Dimensions', '')}"
        for tensor in details.get("Inputs", ())
    )
    return LayerCall(name=name, kind=details.get("LayerType", ""), milliseconds=milliseconds, shapes=shapes)
