"""Cost of a video with all tokens, with EVS before the decoder, with TRIO inside it, and with both.

    python benchmarks/video_cost.py --model qwen3-vl-4b --frame-size 448x256

Nothing is measured: FLOPs and KV bytes are counted, times predicted, with the errors of docs/prediction.md. The
vision graph runs once per pair of frames. The text is the question; Qwen3-VL's timestamps are not counted.
"""

from __future__ import annotations

import dataclasses

from parts.arguments import errors_in_one_line, parser_for
from parts.tables import markdown
from reduction_places import HEADS, row

from trio_edge.profiling.predict.answer import PRECISIONS, Setting
from trio_edge.profiling.predict.plan import parse_size, plan_for
from trio_edge.trio.budgets import ScheduleRequest, parse_keep
from trio_edge.trio.cost.selections import TokenSizes
from trio_edge.trio.cost.work import counted_work, sum_of
from trio_edge.trio.methods import token_method


def settings(whole: Setting, *, share: float, evs_share: float) -> dict[str, Setting]:
    """Return the settings to compare; each reduction's average keep is a share of its own input."""
    decoder, num_visual = whole.model.decoder, whole.sizes["N"]
    kept = max(1, int(evs_share * num_visual))
    sizes = TokenSizes(num_visual, kept, whole.num_text, {"visual_tokens": decoder.hidden_size})
    cost = token_method("evs").cost(sizes)
    reduced = sum_of([counted_work(cost.flops, rows=num_visual)] * whole.num_images)
    evs = dataclasses.replace(whole, entering=kept, before=(("reduce", reduced),))
    found = {"all tokens": whole, f"EVS {100 * evs_share:.0f} %": evs}
    for name, setting in (("", whole), (f"EVS {100 * evs_share:.0f} % and ", evs)):
        entering = setting.num_images * (setting.entering or num_visual)
        schedule = ScheduleRequest(average=share).schedule(num_layers=decoder.num_layers, num_visual=entering)
        found[f"{name}TRIO {100 * share:.1f} %"] = dataclasses.replace(setting, schedule=schedule)
    return found


def main() -> None:
    """Print a table."""
    parser = parser_for(__doc__)
    parser.add_argument("--model", default="qwen3-vl-4b", help="alias of a released model that takes videos")
    parser.add_argument("--frame-size", type=parse_size, default=(448, 256), metavar="WxH")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--keep", default="11.1%", metavar="PERCENT", help="average keep of TRIO")
    parser.add_argument(
        "--evs-keep", default="25%", metavar="PERCENT", help="keep of EVS, per pair of frames"
    )
    parser.add_argument("--device", default="jetson-orin-nx-16")
    parser.add_argument("--quantize", choices=PRECISIONS, default="int4", help="format of the decoder")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    with errors_in_one_line(parser):
        rows: list[tuple[str, ...]] = []
        for frames in options.frames:
            whole = plan_for(
                model=options.model,
                image_size=options.frame_size,
                precision=PRECISIONS[options.quantize],
                num_new=options.new_tokens,
                num_images=-(-frames // 2),
            )
            found = settings(whole, share=parse_keep(options.keep), evs_share=parse_keep(options.evs_keep))
            rows += [(str(frames), *row(name, one, options.device)) for name, one in found.items()]
        print(markdown(("frames", *HEADS), rows))


if __name__ == "__main__":
    main()
