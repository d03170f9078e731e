"""Growth of prefill, selection and KV cache with the visual tokens N, counted and measured, with fitted exponents.

    python benchmarks/cost_growth.py                  # counted for LLaVA-NeXT-7B, predicted for an AGX Orin
    python benchmarks/cost_growth.py --hidden 1024    # also measures one layer and one stage of that hidden size here

An exponent is the slope of a straight line through the logarithms: 1 is proportional to N, 2 to its square. Text fills a bucket
of 64 rows, which makes slopes a little smaller. Measured times are processor times of one thread of ONNX Runtime, in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from parts.arguments import parser_for
from parts.tables import markdown

from trio_edge.profiling.predict.answer import Setting, predict
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.trio.budgets import ScheduleRequest
from trio_edge.trio.cost.devices import DEVICES
from trio_edge.trio.cost.flops import kv_row_bytes

SIZES = (576, 1152, 1728, 2304, 2880)
NUM_TEXT = 64
MODEL, DEVICE = "llava-next-7b", "jetson-agx-orin-64"


def exponent(values: list[float]) -> float:
    """Return the slope of the logarithms over those of ``SIZES``."""
    return float(np.polyfit(np.log(SIZES), np.log(values), 1)[0])


def print_table(title: str, rows: dict[str, list[float]], *, digits: int = 1) -> None:
    cells = [
        (name, *(f"{value:.{digits}f}" for value in values), f"{exponent(values):.2f}")
        for name, values in rows.items()
    ]
    print(
        f"\n**{title}**\n\n{markdown(('', *(f'N = {size}' for size in SIZES), 'exponent'), cells)}",
        flush=True,
    )


def counted(keep: float) -> dict[str, list[float]]:
    """Return FLOPs, KV bytes and predicted times by N at one average keep, for the decoder alone."""
    setting = plan_for(model=MODEL, num_text=NUM_TEXT, precision="float16")
    rows: dict[str, list[float]] = {}
    for size in SIZES:
        schedule = ScheduleRequest(average=keep).schedule(
            num_layers=setting.model.decoder.num_layers, num_visual=size
        )
        prediction = predict(
            dataclasses.replace(setting, schedule=schedule, sizes={**setting.sizes, "N": size}),
            DEVICES[DEVICE],
        )
        prefill = [
            timed for timed in prediction.runs if timed.run.phase == "prefill" and timed.run.name != "vision"
        ]
        selects = [timed for timed in prefill if timed.run.name.startswith("select")]
        layers = [timed for timed in prefill if timed not in selects]
        values = {
            "decoder TFLOP": sum(timed.run.work.flops for timed in layers) / 1e12,
            "selection TFLOP": sum(timed.run.work.flops for timed in selects) / 1e12,
            "KV cache after prefill MB": _kv_bytes(prediction.setting) / 1e6,
            f"decoder ms, predicted for {DEVICE}": 1e3 * sum(timed.time.seconds for timed in layers),
            f"selection ms, predicted for {DEVICE}": 1e3 * sum(timed.time.seconds for timed in selects),
        }
        for name, value in values.items():
            if value:
                rows.setdefault(name, []).append(value)
    return rows


def _kv_bytes(setting: Setting) -> int:
    row_bytes = kv_row_bytes(setting.model.decoder, bytes_per_cached=setting.formats.bytes_per_cached)
    return row_bytes * sum(len(layers) * (rows + NUM_TEXT) for layers, rows in setting.ranges)


def measured(hidden: int) -> dict[str, list[float]]:
    """Return milliseconds of one decoder layer's prefill and of one stage by N."""
    from parts.layer_graphs import LayerGraphs, median_seconds

    rows: dict[str, list[float]] = {
        "one layer, prefill ms": [],
        "one stage, selection ms": [],
        "KV cache of the layer MB": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        graphs = LayerGraphs(hidden, Path(folder))
        session = graphs.range_session()
        for size in SIZES:
            feeds = graphs.range_feeds(rows=size + NUM_TEXT, past=0)
            outputs = session.run(None, feeds)
            rows["KV cache of the layer MB"].append(sum(part.nbytes for part in outputs[1:]) / 1e6)
            rows["one layer, prefill ms"].append(
                1e3 * median_seconds(functools.partial(session.run, None, feeds), repeats=3)
            )
        for size in SIZES:
            stage = graphs.select_session(num_visual=size, num_text=NUM_TEXT)
            feeds = graphs.select_feeds(num_visual=size, num_text=NUM_TEXT)
            rows["one stage, selection ms"].append(
                1e3 * median_seconds(functools.partial(stage.run, None, feeds), repeats=3)
            )
    return rows


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--hidden", type=int, nargs="*", default=[], help="hidden sizes of measured layers")
    options = parser.parse_args()
    print_table(f"{MODEL}, keep-all, {NUM_TEXT} text tokens, float16", counted(1.0), digits=2)
    print_table(f"{MODEL}, 11.1 %, {NUM_TEXT} text tokens, float16", counted(0.111), digits=2)
    for hidden in options.hidden:
        machine = (
            f"ONNX Runtime {onnxruntime.__version__}, {platform.machine()}, Python {sys.version.split()[0]}"
        )
        print_table(f"hidden size {hidden}, measured on {machine}", measured(hidden))


if __name__ == "__main__":
    main()
