"""Predicted times and memory of released models on Jetson Orin: by keep, by format, and a model for each module.

    python benchmarks/orin_times.py --model llava-next-7b@672x672 qwen2.5-vl-7b@1008x1008 --text 64
    python benchmarks/orin_times.py --quantize int4 int4,vision=int8 all=int8     # INT8 with INT8 inputs (W8A8) against INT4
    python benchmarks/orin_times.py --modules

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
    from trio_edge.profiling.predict.answer import Prediction

QUANTIZED: dict[str, Formats] = {
    "int4": Formats(layer="int4"),
    "int4,vision=int8": Formats(layer="int4", vision="int8", inputs=frozenset({"vision"})),
    "all=int8": Formats(
        layer="int8", head="int8", vision="int8", inputs=frozenset({"layer", "head", "vision"})
    ),
}
"""Formats by ``trio-calibrate --quantize``. INT4 has float16 inputs, INT8 has INT8 inputs."""
MODULES = {
    "orin-nano-8": "qwen3-vl-2b",
    "orin-nx-16": "qwen3-vl-4b",
    "agx-orin-32": "qwen3-vl-8b",
    "agx-orin-64": "llava-next-7b",
}
"""A model for each module, which leaves room for other programs."""
_MODULE_KEEPS = ("100%", "33.3%", "11.1%")
_MODULE_IMAGE = (1280, 720)
_SIZE = "1024x1024"


def cell(prediction: Prediction) -> str:
    """Return one prediction as text."""
    if not prediction.memory.fits:
        return "does not fit"
    vision = 1e3 * prediction.runs[0].time.seconds
    first, token = (1e3 * prediction.seconds(phase) for phase in ("prefill", "decode"))
    return f"{vision:.0f} + {first - vision:.0f} ms, {token:.1f}"


def rows(model: str, keep: str, formats: list[str], devices: list[str], *, text: int) -> list[list[str]]:
    """Return a line for each format; ``model`` may end with the size of the image."""
    model, _, size = model.partition("@")
    setting, lines = plan_for(model=model, keep=keep, image_size=parse_size(size or _SIZE), num_text=text), []
    kept = (stage.keep for stage in setting.schedule.stages)
    tokens = " > ".join(map(str, (setting.num_images * setting.visual_rows[0], *kept)))
    for name in formats:
        own = dataclasses.replace(setting, formats=QUANTIZED[name])
        predictions = [predict(own, find_device(device)) for device in devices]
        gib = f"{predictions[0].memory.total / 2**30:.1f}"
        lines.append([model, f"`{name}`", keep, tokens, gib, *map(cell, predictions)])
    return lines


def module_row(module: str, model: str) -> list[str]:
    """Return a module's line: memory at keep-all, and times by keep."""
    device, found = find_device(module), []
    for keep in _MODULE_KEEPS:
        plan = plan_for(model=model, keep=keep, image_size=_MODULE_IMAGE, precision="int4")
        found.append(predict(plan, device))
    tokens = sorted({f"{1 / one.seconds('decode'):.0f}" for one in found}, key=float)
    memory = f"{found[0].memory.total / 2**30:.1f} of {found[0].memory.usable / 2**30:.1f}"
    firsts = (f"{1e3 * one.seconds('prefill'):.0f} ms" for one in found)
    return [module, f"`{model}`", memory, *firsts, " to ".join(dict.fromkeys((tokens[0], tokens[-1])))]


def main() -> None:
    """Print a table for each model, or for the modules."""
    parser = parser_for(__doc__)
    parser.add_argument("--modules", action="store_true", help="a model for each module, 1280x720, INT4")
    parser.add_argument("--model", nargs="+", default=["qwen3-vl-4b"], help=f"NAME or NAME@WxH, {_SIZE}")
    parser.add_argument("--text", type=int, default=40, help="tokens of text")
    parser.add_argument("--keep", nargs="+", default=["100%", "11.1%"], metavar="PERCENT")
    parser.add_argument("--quantize", nargs="+", choices=[*QUANTIZED], default=["int4"])
    parser.add_argument("--device", nargs="+", default=["agx-orin-64", "orin-nx-16", "orin-nano-8"])
    options = parser.parse_args()
    with errors_in_one_line(parser):
        if options.modules:
            heads = ["module", "model, INT4", "GiB of usable", *_MODULE_KEEPS, "further tokens a second"]
            print(markdown(heads, [module_row(*pair) for pair in MODULES.items()]))
            return
        lines = [
            line
            for model in options.model
            for keep in options.keep
            for line in rows(model, keep, options.quantize, options.device, text=options.text)
        ]
        print(markdown(["model", "`--quantize`", "keep", "visual tokens", "GiB", *options.device], lines))


if __name__ == "__main__":
    main()
