"""Predicted speed of INT8 with INT8 inputs (W8A8) against INT4 with float16 inputs, for released shapes on Jetson Orin.

    python benchmarks/int8_inputs.py --model qwen2.5-vl-7b qwen3-vl-4b --image-size 1024x1024

Nothing is measured: times are predicted, with the errors of docs/prediction.md. Each cell: vision + the rest to the
first token, then each further token.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from parts.arguments import errors_in_one_line, parser_for
from parts.tables import markdown

from trio_edge.profiling.predict.answer import predict
from trio_edge.profiling.predict.plan import parse_size, plan_for
from trio_edge.profiling.predict.speed import Formats
from trio_edge.trio.cost.devices import find_device

if TYPE_CHECKING:
    from trio_edge.profiling.predict.answer import Prediction, Setting

QUANTIZED: dict[str, Formats] = {
    "int4": Formats(layer="int4"),
    "int4,vision=int8": Formats(layer="int4", vision="int8", inputs=frozenset({"vision"})),
    "all=int8": Formats(
        layer="int8", head="int8", vision="int8", inputs=frozenset({"layer", "head", "vision"})
    ),
}
"""Formats by ``trio-calibrate --quantize``. INT4 has float16 inputs, INT8 has INT8 inputs."""


def cell(prediction: Prediction) -> str:
    """Return one prediction as text."""
    if not prediction.memory.fits:
        return "does not fit"
    vision, first, token = (
        1e3 * seconds
        for seconds in (
            prediction.runs[0].time.seconds,
            prediction.seconds("prefill"),
            prediction.seconds("decode"),
        )
    )
    return f"{vision:.0f} + {first - vision:.0f} ms, {token:.1f}"


def rows(setting: Setting, keep: str, devices: list[str]) -> list[list[str]]:
    """Return a line for each format."""
    lines = []
    for name, formats in QUANTIZED.items():
        predictions = [
            predict(dataclasses.replace(setting, formats=formats), find_device(device)) for device in devices
        ]
        gib = predictions[0].memory.total / 2**30
        lines.append([f"`{name}`", keep, f"{gib:.1f}", *map(cell, predictions)])
    return lines


def main() -> None:
    """Print a table for each model."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", nargs="+", default=["qwen2.5-vl-7b", "qwen3-vl-4b"])
    parser.add_argument("--image-size", type=parse_size, default=(1024, 1024), metavar="WxH")
    parser.add_argument("--keep", nargs="+", default=["100%", "11.1%"], metavar="PERCENT")
    parser.add_argument("--device", nargs="+", default=["agx-orin-64", "orin-nx-16", "orin-nano-8"])
    options = parser.parse_args()
    with errors_in_one_line(parser):
        for model in options.model:
            lines = []
            for keep in options.keep:
                setting = plan_for(model=model, keep=keep, image_size=options.image_size)
                lines += rows(setting, keep, options.device)
            heads = ["`--quantize`", "keep", "GiB", *options.device]
            print(f"\n**{model}, {'x'.join(map(str, options.image_size))}**\n\n{markdown(heads, lines)}")


if __name__ == "__main__":
    main()
