"""Three places to drop visual tokens, at the same average keep: before the decoder, once inside it, or in stages.

    python benchmarks/reduction_places.py --model qwen3-vl-4b --image-size 1024x1024

Nothing is measured: FLOPs and KV bytes are counted, times predicted, with the errors of docs/prediction.md. "DART
before the decoder" is the method of TensorRT Edge-LLM: eight pivots among the embeddings, and the same tokens in every layer.
"""

from __future__ import annotations

import dataclasses

from parts.arguments import errors_in_one_line, parser_for
from parts.tables import markdown

from trio_edge.profiling.predict.answer import PRECISIONS, Setting, predict
from trio_edge.profiling.predict.plan import parse_size, plan_for
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.budgets import ScheduleRequest, parse_keep
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.cost.flops import kv_row_bytes
from trio_edge.trio.cost.selections import NUM_DART_PIVOTS
from trio_edge.trio.cost.work import counted_work

INSIDE = {"TRIO": "trio", "DART inside": "dart", "FastV": "fastv"}
_TIMES = ("decoder's prefill, ms", "first token, ms", "a token, ms", "answer, s")
HEADS = ("", "stages", "decoder TFLOP", "KV rows, MB", *_TIMES)


def settings(whole: Setting, share: float) -> dict[str, Setting]:
    """Return the settings to compare, without methods that cannot keep so little."""
    decoder, num_visual = whole.model.decoder, whole.sizes["N"]
    pivots = 2 * 2 * NUM_DART_PIVOTS * num_visual * decoder.hidden_size
    before = (("reduce", counted_work(float(pivots), rows=num_visual)),)
    found = {
        "all tokens": whole,
        "DART before the decoder": dataclasses.replace(
            whole, entering=max(1, int(share * num_visual)), before=before
        ),
    }
    for name, method in INSIDE.items():
        try:
            schedule = ScheduleRequest(method=method, average=share).schedule(
                num_layers=decoder.num_layers, num_visual=num_visual, linear_layers=decoder.linear_layers
            )
        except ScheduleError:
            continue
        found[name] = dataclasses.replace(whole, schedule=schedule)
    return found


def row(name: str, setting: Setting, device: str) -> tuple[str, ...]:
    """Return a line of the table."""
    prediction = predict(setting, find_device(device))
    prefill = [
        timed for timed in prediction.runs if timed.run.phase == "prefill" and timed.run.name != "vision"
    ]
    rows = sum(
        setting.model.decoder.num_cached(layers) * (rows + setting.num_text)
        for layers, rows in setting.ranges
    )
    stages = ", ".join(f"{stage.layer}:{stage.keep}" for stage in setting.schedule.stages)
    row_bytes = kv_row_bytes(setting.model.decoder, bytes_per_cached=setting.formats.bytes_per_cached)
    return (
        name,
        stages or str(setting.num_images * (setting.entering or setting.sizes["N"])),
        f"{sum(timed.run.work.flops for timed in prefill) / 1e12:.2f}",
        f"{rows * row_bytes / 1e6:.1f}",
        f"{1e3 * sum(timed.time.seconds for timed in prefill):.0f}",
        f"{1e3 * prediction.seconds('prefill'):.0f}",
        f"{1e3 * prediction.seconds('decode'):.1f}",
        f"{prediction.answer_seconds:.2f}",
    )


def main() -> None:
    """Print a table for each keep and device."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", default="qwen3-vl-4b", help="alias of a released model")
    parser.add_argument("--image-size", type=parse_size, default=(1024, 1024), metavar="WxH")
    parser.add_argument("--keep", nargs="+", default=["22.2%", "11.1%"], metavar="PERCENT")
    parser.add_argument("--device", nargs="+", default=["jetson-orin-nx-16"])
    parser.add_argument("--quantize", choices=PRECISIONS, default="int4", help="format of the decoder")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with errors_in_one_line(parser):
        whole = plan_for(
            model=options.model,
            image_size=options.image_size,
            precision=PRECISIONS[options.quantize],
            num_new=options.new_tokens,
        )
        for device in options.device:
            for keep in options.keep:
                found = settings(whole, parse_keep(keep))
                label = keep.replace("%", " %")
                rows = [
                    row(name if name == "all tokens" else f"{label}, {name}", setting, device)
                    for name, setting in found.items()
                ]
                print(
                    f"\n**{options.model}, {keep}, {device}, {options.quantize}**\n\n{markdown(HEADS, rows)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
