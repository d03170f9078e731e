"""Effect of each of TRIO's settings on a small model: probe rows, threshold, stage layers, stages, shapes, positions.

    python benchmarks/ablation.py --count 1000 --out out/ablation
    python benchmarks/ablation.py --count 2000 --groups rows positions --budgets 33.3 22.2 11.1
    python benchmarks/ablation.py --count 160 --groups positions tau --model out/small-vlm --out out/ablation-small

Each line differs from the default export only in what it names. Bundles and answers are stored in the output folder, so the same
command continues an interrupted run. One Markdown table is printed per budget: accuracy with Wilson's interval, and the
differences from keep-all and from the default by paired bootstrap over images, 95 %. Lines that a budget cannot have, because
the layers before the first stage already use it up, are named at the end.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from parts.arguments import parser_for, positive
from parts.asking import METRIC, answers_of
from parts.drawn_questions import SMALL_VLM
from parts.tables import markdown

from trio_edge.calibration.evaluate.comparison import RunReport, compare
from trio_edge.calibration.evaluate.report import per_cent
from trio_edge.calibration.evaluate.runs import RunInfo, plan_runs
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.trio.budgets import ScheduleRequest, integer_keeps

if TYPE_CHECKING:
    from trio_edge.calibration.evaluate.answering import Outcome

BUDGETS = {"33.3": 1 / 3, "22.2": 2 / 9, "11.1": 1 / 9}


@dataclass(frozen=True)
class Variant:
    """One selection: a line of the table."""

    name: str
    schedule: dict[str, Any] = field(default_factory=dict)
    """Fields of ``ScheduleRequest``, or of ``ShapedRequest`` if they have a "shape"."""

    def folder(self, budget: str) -> str:
        """Name of the bundle, the same for variants that share one."""
        settings = [f"{key}={_plain(value)}" for key, value in sorted(self.schedule.items())]
        return "-".join([budget, *settings])


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


@dataclass(frozen=True, kw_only=True)
class ShapedRequest(ScheduleRequest):
    """Stages at ``layers`` whose tokens are in the proportion ``shape``, as many as the average allows."""

    shape: tuple[float, ...]

    def schedule(self, *, num_layers: int, num_visual: int, **more: Any) -> Schedule:
        """Return the schedule."""
        assert self.layers is not None
        assert self.average is not None
        weights = [end - start for start, end in zip(self.layers, (*self.layers[1:], num_layers))]
        budget = math.floor(self.average * num_layers * num_visual + 1e-6) - self.layers[0] * num_visual
        unit = sum(weight * share for weight, share in zip(weights, self.shape))
        keeps = integer_keeps(
            [share * budget / unit for share in self.shape],
            budget=budget,
            weights=weights,
            num_visual=num_visual,
        )
        if keeps is None:
            raise ScheduleError(
                f"stages at {self.layers}: expected a budget for them, got {self.average:.1%}; choose others"
            )
        stages = tuple(Stage(layer=layer, keep=keep) for layer, keep in zip(self.layers, keeps))
        usual = super().schedule(num_layers=num_layers, num_visual=num_visual, **more)
        return msgspec.structs.replace(usual, stages=stages)


def bundle_for(variant: Variant | None, budget: str, arguments: argparse.Namespace) -> Path:
    """Return the bundle of a variant, or of keep-all for None; export it if needed."""
    path = Path(arguments.out) / "bundles" / ("all" if variant is None else variant.folder(budget))
    if path.exists():
        return path

    request = ScheduleRequest(average=None)
    if variant is not None:
        make = ShapedRequest if "shape" in variant.schedule else ScheduleRequest
        request = make(average=BUDGETS[budget], **variant.schedule)
    options = ExportOptions(
        model=arguments.model, out=path, schedule=request, dtype="float32", max_text=64, max_new_tokens=24
    )
    export_bundle(options)
    return path


DEFAULT = Variant("default")
"""Four reference rows, threshold 0.8, three stages at the preset's depths and proportions, compact positions."""
GROUPS: dict[str, tuple[Variant, ...]] = {
    "rows": (
        Variant("answer rows", {"probe_rows": "answer"}),
        *(Variant(f"{count} reference rows", {"num_probe_rows": count}) for count in (1, 2, 8)),
        *(
            Variant(f"{count} answer rows", {"probe_rows": "answer", "num_probe_rows": count})
            for count in (1, 2, 8)
        ),
    ),
    "tau": tuple(
        Variant(f"threshold {threshold}", {"nms_threshold": threshold})
        for threshold in (0.5, 0.6, 0.7, 0.9, 0.95, 1.0)
    ),
    "layers": (
        *(Variant(f"one stage, layer {layer}", {"layers": (layer,)}) for layer in (1, 2, 3, 4, 5)),
        *(
            Variant(f"three stages, layers {', '.join(map(str, layers))}", {"layers": layers})
            for layers in ((1, 2, 3), (1, 3, 5), (1, 8, 12), (2, 5, 8))
        ),
    ),
    "stages": (
        Variant("two stages, layers 1, 8", {"layers": (1, 8)}),
        Variant("four stages, layers 1, 4, 7, 10", {"layers": (1, 4, 7, 10)}),
        Variant("six stages, layers 1, 3, 5, 7, 9, 11", {"layers": (1, 3, 5, 7, 9, 11)}),
    ),
    "shapes": (
        Variant("nearly flat 10 : 9 : 8", {"layers": (1, 5, 8), "shape": (10.0, 9.0, 8.0)}),
        Variant("gentle 4 : 3 : 2", {"layers": (1, 5, 8), "shape": (4.0, 3.0, 2.0)}),
        Variant("steep 9 : 3 : 1", {"layers": (1, 5, 8), "shape": (9.0, 3.0, 1.0)}),
        Variant("very steep 25 : 5 : 1", {"layers": (1, 5, 8), "shape": (25.0, 5.0, 1.0)}),
    ),
    "positions": (
        Variant("preserved positions", {"positions": "preserved"}),
        Variant("answer rows, preserved positions", {"probe_rows": "answer", "positions": "preserved"}),
    ),
}


def fits(variant: Variant, budget: str, *, num_layers: int) -> bool:
    """Return whether the layers before the first stage leave something of the budget."""
    return bool(variant.schedule.get("layers", (1,))[0] < num_layers * BUDGETS[budget])


def against_default(
    runs: list[tuple[RunInfo, dict[int, Outcome]]], *, metric: str = METRIC
) -> tuple[list[RunReport], list[RunReport]]:
    """Return every run compared with keep-all, which is first, and with the default, which is second."""
    with_all = compare(runs, metric=metric)
    _, (info, default), *others = runs
    base = (msgspec.structs.replace(info, is_reference=True), default)
    return with_all[1:], compare([base, *others], metric=metric)


def table(
    reports: tuple[list[RunReport], list[RunReport]], names: list[tuple[str, str]], bundles: list[Path]
) -> str:
    """Return the table of one budget."""
    heads = (
        "group",
        "variant",
        "stages",
        "accuracy %",
        "minus keep-all",
        "minus default",
        "KL, nats",
        "kept %",
    )
    rows = []
    for (group, name), bundle, run, other in zip(names, bundles, *reports, strict=True):
        full, default = run.against_reference, other.against_reference
        assert full is not None
        stages = open_bundle(bundle).manifest.schedule.stages
        rows.append(
            (
                group,
                name,
                ", ".join(f"{stage.layer}:{stage.keep}" for stage in stages),
                per_cent(run.accuracy),
                per_cent(full.difference, signed=True),
                "" if default is None else per_cent(default.difference, signed=True),
                "" if full.first_token_kl is None else f"{full.first_token_kl:.3f}",
                f"{100 * run.average_keep:.1f}",
            )
        )
    return markdown(heads, rows)


def options_of() -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--model", choices=["tiny", SMALL_VLM], default="tiny")
    parser.add_argument("--count", type=positive, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    parser.add_argument("--budgets", nargs="*", choices=list(BUDGETS), default=["11.1"])
    parser.add_argument("--groups", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    return parser.parse_args()


def main() -> None:
    arguments = options_of()
    arguments.out.mkdir(parents=True, exist_ok=True)
    full = bundle_for(None, "", arguments)
    num_layers = open_bundle(full).manifest.dimensions.num_layers
    chosen = [("", DEFAULT), *((group, one) for group in arguments.groups for one in GROUPS[group])]
    left_out, written = [], {}
    print(f"{arguments.model}, {arguments.count} held-out questions (seed {arguments.seed}), float32\n")
    for budget in arguments.budgets:
        lines = [line for line in chosen if fits(line[1], budget, num_layers=num_layers)]
        left_out += [f"{one.name} at {budget} %" for group, one in chosen if (group, one) not in lines]
        names = [(group, variant.name) for group, variant in lines]
        bundles = [bundle_for(variant, budget, arguments) for _, variant in lines]
        runs = plan_runs([], reference=full)
        for bundle, (_, name) in zip(bundles, names):  # one by one: two choices may give the same bundle
            runs += plan_runs([bundle], labels=[f"{name} {budget} %"])
        asked = {"count": arguments.count, "seed": arguments.seed, "model": arguments.model}
        answers = answers_of(runs, out=arguments.out, **asked)
        reports = against_default(answers)
        written[budget] = [msgspec.to_builtins(run) for run in reports[0]]
        print(f"{budget} %; all visual tokens: {per_cent(compare(answers[:1], metric=METRIC)[0].accuracy)}\n")
        print(table(reports, names, bundles), end="\n\n")
    (arguments.out / "ablation.json").write_text(json.dumps(written), encoding="utf-8")
    if left_out:
        print(f"no room: {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
