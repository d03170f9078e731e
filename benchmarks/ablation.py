"""What each of TRIO's choices is worth on the packaged model: probe rows, threshold, stage layers, stages, shapes, positions.

    python benchmarks/ablation.py --count 1000 --workers 2 --out out/ablation
    python benchmarks/ablation.py --count 2000 --groups rows positions --budgets 33.3 22.2 11.1

Every line differs from the default export in what it names and in nothing else. Bundles are exported once into the output
folder, answers are kept there (a run given again goes on), and one Markdown table is printed per budget: accuracy with
Wilson's interval, and the differences from keep-all and from the default by paired bootstrap over pictures, 95 %. A line that
the budget has no room for (layers in front of the first stage see all tokens) is left out, and named at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from tiny_accuracy import (
    BUDGETS,
    Variant,
    add_common_options,
    answered,
    bundle_for,
    planned,
)

from trio_edge.calibration.evaluate.comparison import RunReport, compare
from trio_edge.calibration.evaluate.report_table import per_cent
from trio_edge.calibration.evaluate.running.runs import RunInfo
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from trio_edge.calibration.evaluate.running.answering import Outcome

DEFAULT = Variant("default")
"""Reference rows (4), threshold 0.8, three stages at the preset's depths in its proportions, compact positions."""
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
    """Return whether the layers in front of the first stage leave something of the budget."""
    return bool(variant.schedule.get("layers", (1,))[0] < num_layers * BUDGETS[budget])


def against_default(
    runs: list[tuple[RunInfo, dict[int, Outcome]]], *, metric: str = "exact"
) -> tuple[list[RunReport], list[RunReport]]:
    """Return every run compared with keep-all, which is first, and with the default, which is second."""
    with_all = compare(runs, metric=metric)
    _, (info, default), *others = runs
    base = (msgspec.structs.replace(info, is_reference=True), default)
    return with_all[1:], compare([base, *others], metric=metric)


def table(
    reports: tuple[list[RunReport], list[RunReport]], names: list[tuple[str, str]], bundles: list[Path]
) -> str:
    """Return the lines of one budget."""
    lines = [
        "| group | variant | stages | accuracy % | minus keep-all | minus default | KL, nats | kept % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (group, name), bundle, run, beside in zip(names, bundles, *reports, strict=True):
        full, default = run.against_reference, beside.against_reference
        assert full is not None
        kl = "" if full.first_token_kl is None else f"{full.first_token_kl:.3f}"
        cells = [
            group,
            name,
            ", ".join(
                f"{stage.layer}:{stage.keep}" for stage in open_bundle(bundle).manifest.schedule.stages
            ),
            per_cent(run.accuracy),
            per_cent(full.difference, signed=True),
            "" if default is None else per_cent(default.difference, signed=True),
            kl,
            f"{100 * run.average_keep:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser, out=Path("out/ablation"), budgets=["11.1"])
    parser.add_argument("--groups", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    num_layers = open_bundle(bundle_for(None, "", arguments)).manifest.dimensions.num_layers
    chosen = [("", DEFAULT), *((group, one) for group in arguments.groups for one in GROUPS[group])]
    left_out, written = [], {}
    print(f"{arguments.model}, {arguments.count} held-out questions (seed {arguments.seed}), float32\n")
    for budget in arguments.budgets:
        lines = [line for line in chosen if fits(line[1], budget, num_layers=num_layers)]
        left_out += [f"{one.name} at {budget} %" for group, one in chosen if (group, one) not in lines]
        one_budget = argparse.Namespace(**{**vars(arguments), "budgets": [budget]})
        variants = [variant for _, variant in lines]
        runs = answered(planned(variants, one_budget), arguments)
        reports = against_default(runs)
        written[budget] = [msgspec.to_builtins(run) for run in reports[0]]
        bundles = [bundle_for(variant, budget, arguments) for variant in variants]
        names = [(group, variant.name) for group, variant in lines]
        print(f"{budget} %; all visual tokens: {per_cent(compare(runs[:1], metric='exact')[0].accuracy)}\n")
        print(table(reports, names, bundles), end="\n\n")
    (arguments.out / "ablation.json").write_text(json.dumps(written), encoding="utf-8")
    if left_out:
        print(f"no room: {'; '.join(left_out)}")


if __name__ == "__main__":
    main()
