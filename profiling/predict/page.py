"""Predictions as one HTML page in the layout of a profile; it says that nothing was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trio_edge.profiling.page.figures import Bar, stacked
from trio_edge.profiling.page.page import render
from trio_edge.profiling.predict.printing import GIB, NOTE, device_note, row_of, text_of
from trio_edge.profiling.predict.speed import fitted_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.page.figures import Plot
    from trio_edge.profiling.predict.answer import Prediction
    from trio_edge.profiling.predict.plan import Plan

MOST_DRAWN = 8
"""Most settings in the figures and with a table of graphs; the summary has all."""


def prediction_page(found: Sequence[tuple[Plan, Prediction]], values: dict[str, Any]) -> bytes:
    """Return the page of at least one prediction; ``values`` is the content of their JSON."""
    devices = {prediction.device.name: prediction.device for _, prediction in found}
    drawn, setting = found[:MOST_DRAWN], found[0][1].setting
    plots = [_first_token(drawn), _memory(drawn)]
    if len(found) > len(drawn):
        for plot in plots:
            plot.note += f" The first {len(drawn)} of {len(found)} settings."
    return render(
        "trio_edge.profiling.predict:page.html.j2",
        plots=plots,
        values=values,
        model=setting.model.name,
        devices=list(devices),
        note=NOTE,
        asked=f"{text_of(setting)}, {setting.num_new} new tokens",
        notes=[device_note(device) for device in devices.values()],
        goal=values.get("wish"),
        num_drawn=len(drawn),
        rows=[_row(plan, prediction) for plan, prediction in found],
    )


def _row(plan: Plan, prediction: Prediction) -> dict[str, str]:
    error = f"{fitted_for(prediction.device).new_runtime.nine_in_ten:.0%}"
    return {**row_of(plan, prediction), "error, 9 in 10": error}


def _labels(found: Sequence[tuple[Plan, Prediction]]) -> list[str]:
    """Return the settings in words, with the device if there are several."""
    several = len({prediction.device.name for _, prediction in found}) > 1
    return [
        f"{prediction.device.name}, {plan.described()}" if several else plan.described()
        for plan, prediction in found
    ]


def _first_token(found: Sequence[tuple[Plan, Prediction]]) -> Plot:
    bars = []
    for label, (_, prediction) in zip(_labels(found), found):
        times = [(one.run, one.time) for one in prediction.runs if one.run.phase == "prefill"]
        bars.append(Bar(label, [(run.name, 1e3 * time.seconds) for run, time in times]))
    note = "Predicted, without the host's work on image and text."
    return stacked(bars, title="Time to the first token by graph", unit="ms", note=note)


def _memory(found: Sequence[tuple[Plan, Prediction]]) -> Plot:
    bars = []
    for label, (_, prediction) in zip(_labels(found), found):
        memory = prediction.memory
        parts = {"weights": memory.weights, "KV caches": memory.kv_caches, "activations": memory.activations}
        text = label if memory.fits else f"{label} (does not fit {memory.usable / GIB:.1f})"
        bars.append(Bar(text, [(name, count / GIB) for name, count in parts.items()]))
    return stacked(bars, title="Memory", unit="GiB", note="Bytes that must be in memory at once.")
