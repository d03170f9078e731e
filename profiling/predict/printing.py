"""Predictions as tables and as JSON types; both say that nothing was measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from trio_edge.profiling.predict.speed import fitted_for
from trio_edge.runtime.cli.tables import whole_table

if TYPE_CHECKING:
    from rich.console import Console

    from trio_edge.profiling.predict.answer import Prediction, Setting

MIB, GIB = 1 << 20, 1 << 30
NOTE = "PREDICTED, nothing was measured: counted work, the device's rates, and efficiencies of tuned runtimes"


def summary_of(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction as JSON types: times in milliseconds, sizes in bytes, errors as fractions."""
    setting, fitted, memory = prediction.setting, fitted_for(prediction.device), prediction.memory
    return {
        "device": prediction.device.name,
        "model": setting.model.name,
        "keep": setting.keep,
        "image_size": None if setting.image_size is None else list(setting.image_size),
        "precision": setting.formats.layer,
        "visual_tokens": list(setting.visual_rows),
        "stages": [{"layer": stage.layer, "keep": stage.keep} for stage in setting.schedule.stages],
        "text_tokens": setting.num_text,
        "text_rows": setting.text_bucket,
        "new_tokens": setting.num_new,
        "ttft_ms": 1e3 * prediction.seconds("prefill"),
        "ttft_ms_unfused_attention": 1e3 * (prediction.seconds("prefill") + prediction.unfused_seconds),
        "ms_per_token": 1e3 * prediction.seconds("decode"),
        "answer_ms": 1e3 * prediction.answer_seconds,
        "memory": {**dataclasses.asdict(memory), "fits": memory.fits},
        "error": {
            "num_figures": fitted.num_figures,
            "new_model": dataclasses.asdict(fitted.new_model),
            "new_runtime": dataclasses.asdict(fitted.new_runtime),
            "device_validated": prediction.device.name in fitted.devices,
        },
        "graphs": [
            {
                "name": timed.run.name,
                "phase": timed.run.phase,
                "flops": timed.run.work.flops,
                "milliseconds": 1e3 * timed.time.seconds,
                "bound": timed.time.bound,
            }
            for timed in prediction.runs
        ],
    }


def print_prediction(console: Console, prediction: Prediction) -> None:
    """Print the time of every graph, and a summary."""
    setting, device = prediction.setting, prediction.device
    table = whole_table(
        "graph", "phase", "GFLOP", "ms", "bound by", title=escape(f"{setting.model.name} on {device.name}")
    )
    for timed in prediction.runs:
        run, time = timed.run, timed.time
        table.add_row(
            run.name, run.phase, f"{run.work.flops / 1e9:.1f}", f"{1e3 * time.seconds:.2f}", time.bound
        )
    console.print(table)
    lines = {
        "setting": f"{_described(setting)}: {' > '.join(map(str, setting.visual_rows))} visual tokens,"
        f" {setting.num_text} text in {setting.text_bucket} rows, {setting.num_new} new",
        "first token": f"{_milliseconds(prediction.seconds('prefill'))} ms, up to"
        f" {_milliseconds(prediction.seconds('prefill') + prediction.unfused_seconds)} ms if attention is not one kernel",
        "next tokens": f"{1e3 * prediction.seconds('decode'):.1f} ms each,"
        f" {1 / prediction.seconds('decode'):.1f} a second",
        "answer": f"{_milliseconds(prediction.answer_seconds)} ms,"
        f" {1 / prediction.answer_seconds:.2f} a second, without the host's work",
        "memory": _memory(prediction),
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:12}[/] {text}", highlight=False, soft_wrap=True)
    known = f"{device.name}: {fitted_for(device).sentence(device.name)}"
    if doubtful := [name for name in ("bandwidth_bytes_per_s", "fp16_flops") if not device.is_verified(name)]:
        known += "; not verified in the vendor's own output: " + ", ".join(doubtful)
    for note in (f"[bold]{NOTE}.[/]", f"{known}."):
        console.print(note, highlight=False, soft_wrap=True)


def _described(setting: Setting) -> str:
    keep = "the bundle's schedule" if setting.keep is None else f"keep {setting.keep}"
    image = "its largest image" if setting.image_size is None else "{}x{}".format(*setting.image_size)
    images = "" if setting.num_images == 1 else f"{setting.num_images} times "
    return f"{keep}, {images}{image}, {setting.formats.layer}"


def _milliseconds(seconds: float) -> str:
    """Return a time in milliseconds with at least two digits."""
    return f"{1e3 * seconds:.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2g}"


def _memory(prediction: Prediction) -> str:
    memory = prediction.memory
    verdict = "fits" if memory.fits else "does NOT fit"
    return (
        f"{_size(memory.total)} ({_size(memory.weights)} weights, {_size(memory.kv_caches)} KV caches,"
        f" {_size(memory.buffers)} buffers, {_size(memory.workspace)} workspace) of {_size(memory.usable)}: {verdict}"
    )


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.3g} MiB"
