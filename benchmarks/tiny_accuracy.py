"""Accuracy of the packaged model through exported bundles: every budget, TRIO's variants and the position-only baselines.

    python benchmarks/tiny_accuracy.py --count 1000 --out out/accuracy

Exports each bundle once into the output folder (again runs reuse it), asks the same held-out questions of all, writes every
outcome as JSON, and prints one Markdown table with 95 % Wilson intervals. On a 16-layer model an export takes about half a
minute and 1,000 questions take about as long.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track

from trio_edge.calibration.baselines import BASELINES
from trio_edge.calibration.evaluation import Evaluation, evaluate
from trio_edge.calibration.shapes import held_out
from trio_edge.export.bundle import ExportOptions, ScheduleInputs, export_bundle
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.schedule import Schedule
from trio_edge.trio.schedule import schedule_for_keep

_SHIFT = 101  # samples between a question and the picture of the guesser: several questions share a picture
BUDGETS = {"33.3": 1 / 3, "22.2": 2 / 9, "11.1": 1 / 9}


@dataclass(frozen=True)
class Variant:
    """One way to select at one budget."""

    selection: str
    probe_rows: str = "reference"
    positions: str = "compact"

    @property
    def name(self) -> str:
        """For the table."""
        if self.selection != "bundle":
            return f"{self.selection}, {self.positions}"
        return f"TRIO, {self.probe_rows} rows, {self.positions}"


VARIANTS = [
    *(
        Variant("bundle", rows, positions)
        for rows, positions in product(("reference", "answer"), ("compact", "preserved"))
    ),
    *(
        Variant(selection, positions=positions)
        for selection, positions in product(BASELINES, ("compact", "preserved"))
    ),
]


def bundle_for(variant: Variant | None, budget: float, folder: Path, model: str) -> Path:
    """Return the bundle of a variant, exporting it if it is not there yet; None is keep-all."""
    if variant is None:
        path = folder / "bundles" / "all"
    else:
        path = folder / "bundles" / f"{100 * budget:.1f}-{variant.probe_rows}-{variant.positions}"
    if path.exists():
        return path

    def schedule(inputs: ScheduleInputs) -> Schedule:
        if variant is None:
            return Schedule()
        return schedule_for_keep(
            budget,
            num_layers=inputs.num_layers,
            num_visual=inputs.num_visual,
            probe_rows=variant.probe_rows,
            positions=variant.positions,
        )

    options = ExportOptions(model=model, out=path, dtype="float32", max_text=32, max_new_tokens=8)
    export_bundle(options, schedule_for=schedule)
    return path


def run(variant: Variant | None, budget: float, arguments: argparse.Namespace) -> Evaluation:
    """Evaluate one variant on the held-out questions and keep its outcomes."""
    name = (
        "all"
        if variant is None
        else f"{variant.selection}-{variant.probe_rows}-{variant.positions}-{100 * budget:.1f}"
    )
    questions = held_out(arguments.count, seed=arguments.seed)
    selection = "bundle" if variant is None else variant.selection
    with Pipeline.from_bundle(
        bundle_for(variant, budget, arguments.out, arguments.model), threads=1
    ) as pipeline:
        asked = track(
            questions, total=arguments.count, description=name, console=Console(stderr=True), transient=True
        )
        result = evaluate(pipeline, asked, selection=selection)
    (arguments.out / f"{name}.json").write_text(json.dumps(result.to_dict()), encoding="utf-8")
    return result


def guesser(arguments: argparse.Namespace) -> Evaluation:
    """Ask every question about another sample's picture: what can be answered without seeing."""
    samples = list(held_out(arguments.count, seed=arguments.seed))
    others = samples[_SHIFT:] + samples[:_SHIFT]
    swapped = [replace(sample, picture=other.picture) for sample, other in zip(samples, others)]
    with Pipeline.from_bundle(bundle_for(None, 1.0, arguments.out, arguments.model), threads=1) as pipeline:
        return evaluate(pipeline, swapped)


def cell(result: Evaluation) -> str:
    """Return accuracy and interval in per cent."""
    low, high = result.accuracy.interval
    return f"{100 * result.accuracy.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument("--budgets", nargs="*", choices=list(BUDGETS), default=list(BUDGETS))
    parser.add_argument("--skip", nargs="*", default=[], help="variants to leave out: words of their names")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    full = run(None, 1.0, arguments)
    print(
        f"{arguments.model}, {arguments.count} held-out questions (seed {arguments.seed}), ONNX Runtime CPU (1 thread), float32,"
    )
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; exact match in %, 95 % Wilson interval"
    )
    print(f"\nall visual tokens: {cell(full)}; another sample's picture: {cell(guesser(arguments))}\n")
    print("| selection | " + " | ".join(f"{name} %" for name in arguments.budgets) + " |")
    print("|---|" + "---|" * len(arguments.budgets))
    for variant in VARIANTS:
        if any(word in variant.name for word in arguments.skip):
            continue
        cells = [cell(run(variant, BUDGETS[name], arguments)) for name in arguments.budgets]
        print(f"| {variant.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
