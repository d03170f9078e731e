"""Accuracy of the packaged model through exported bundles: every budget, TRIO's variants and the position-only baselines.

    python benchmarks/tiny_accuracy.py --count 1000 --out out/accuracy

Exports each bundle once into the output folder, lets `trio-eval`'s code ask all of them the same held-out questions (again
runs go on where the last one stopped), writes report.json and prints one Markdown table with 95 %
intervals. On a 16-layer model an export takes about half a minute and 1,000 questions take about as long.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.console import Console

from trio_edge.calibration.evaluate.baselines import BASELINES
from trio_edge.calibration.evaluate.comparison import RunInfo, RunReport, compare
from trio_edge.calibration.evaluate.evaluation import evaluate
from trio_edge.calibration.evaluate.questions import digest_of, synthetic_questions
from trio_edge.calibration.evaluate.report_table import per_cent
from trio_edge.calibration.evaluate.running.runs import Run, Settings, answer_runs, keys_of, plan_runs
from trio_edge.calibration.shapes.samples import held_out
from trio_edge.export.bundle import ExportOptions, ScheduleInputs, export_bundle
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.budgets import schedule_for_keep
from trio_edge.trio.keeps import integer_keeps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.calibration.evaluate.running.answering import Outcome

_SHIFT = 101  # samples between a question and the picture of the guesser: several questions share a picture
BUDGETS = {"33.3": 1 / 3, "22.2": 2 / 9, "11.1": 1 / 9}


@dataclass(frozen=True)
class Variant:
    """One way to select: a line of the table."""

    name: str
    schedule: dict[str, Any] = field(default_factory=dict)
    """``schedule_for_keep``'s settings, or ``shaped_schedule``'s where "shape" is among them."""
    export: dict[str, Any] = field(default_factory=dict)
    """``ExportOptions``' other fields."""
    selection: str = "bundle"
    """The bundle's own, or a baseline on its schedule."""

    def folder(self, budget: str) -> str:
        """Name of the bundle, the same for variants that share one."""
        settings = [f"{key}={_plain(value)}" for key, value in sorted((self.schedule | self.export).items())]
        return "-".join([budget, *settings])


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def shaped_schedule(
    average: float,
    *,
    num_layers: int,
    num_visual: int,
    layers: tuple[int, ...],
    shape: tuple[float, ...],
    **settings: Any,
) -> Schedule:
    """Return stages at ``layers`` whose tokens are in the proportion ``shape``, as many as the average allows."""
    weights = [end - start for start, end in zip(layers, (*layers[1:], num_layers))]
    budget = math.floor(average * num_layers * num_visual + 1e-6) - layers[0] * num_visual
    unit = sum(weight * share for weight, share in zip(weights, shape))
    keeps = integer_keeps(
        [share * budget / unit for share in shape], budget=budget, weights=weights, num_visual=num_visual
    )
    if keeps is None:
        raise ScheduleError(
            f"stages at {layers}: expected a budget for them, got {average:.1%}; choose others"
        )
    stages = tuple(Stage(layer=layer, keep=keep) for layer, keep in zip(layers, keeps))
    return Schedule(stages=stages, **settings)


VARIANTS = (
    Variant("TRIO, reference rows, compact", {"probe_rows": "reference", "positions": "compact"}),
    Variant("TRIO, reference rows, preserved", {"probe_rows": "reference", "positions": "preserved"}),
    Variant("TRIO, answer rows, compact", {"probe_rows": "answer", "positions": "compact"}),
    Variant("TRIO, answer rows, preserved", {"probe_rows": "answer", "positions": "preserved"}),
    *(
        Variant(f"{name}, {positions}", {"probe_rows": "reference", "positions": positions}, selection=name)
        for name in BASELINES
        for positions in ("compact", "preserved")
    ),
)


def bundle_for(variant: Variant | None, budget: str, arguments: argparse.Namespace) -> Path:
    """Return the bundle of a variant, exporting it if it is not there yet; None is keep-all."""
    path = Path(arguments.out) / "bundles" / ("all" if variant is None else variant.folder(budget))
    if path.exists():
        return path

    def schedule(inputs: ScheduleInputs) -> Schedule:
        if variant is None:
            return Schedule()
        sizes = {"num_layers": inputs.num_layers, "num_visual": inputs.num_visual}
        make = shaped_schedule if "shape" in variant.schedule else schedule_for_keep
        return make(BUDGETS[budget], **sizes, **variant.schedule)

    options = ExportOptions(model=arguments.model, out=path, dtype="float32", max_text=32, max_new_tokens=8)
    export_bundle(replace(options, **(variant.export if variant else {})), schedule_for=schedule)
    return path


def planned(variants: Sequence[Variant], arguments: argparse.Namespace) -> list[Run]:
    """Return keep-all and every variant at every budget."""
    full = bundle_for(None, "", arguments)
    runs = plan_runs([], reference=full)
    for variant in variants:
        for budget in arguments.budgets:
            bundle = bundle_for(variant, budget, arguments)
            label = f"{variant.name} {budget} %"
            (run,) = plan_runs([bundle], selections=[variant.selection], labels=[label])
            runs.append(Run(msgspec.structs.replace(run.info, label=label, method=variant.name), run.bundle))
    return runs


def measured(runs: list[Run], arguments: argparse.Namespace) -> list[RunReport]:
    """Ask all questions and compare with keep-all."""
    return compare(answered(runs, arguments), metric=Settings().metric)


def answered(runs: list[Run], arguments: argparse.Namespace) -> list[tuple[RunInfo, dict[int, Outcome]]]:
    """Ask all questions that the work folder has no answer to."""
    questions = synthetic_questions(arguments.count, seed=arguments.seed)
    settings = Settings(workers=arguments.workers, answer_tokens=8)
    keys = keys_of(runs, settings, data_sha256=digest_of(questions, metric=settings.metric))
    work = arguments.out / f"work-{arguments.count}-{arguments.seed}"
    console = Console(stderr=True)
    return answer_runs(
        runs,
        keys,
        questions,
        settings,
        folder=work,
        on_start=lambda run, _done: console.print(run.info.label),
    ).runs


def guesser(arguments: argparse.Namespace) -> str:
    """Ask every question about another sample's picture: what can be answered without seeing."""
    samples = list(held_out(arguments.count, seed=arguments.seed))
    others = samples[_SHIFT:] + samples[:_SHIFT]
    swapped = [replace(sample, picture=other.picture) for sample, other in zip(samples, others)]
    with Pipeline.from_bundle(bundle_for(None, "", arguments), threads=1) as pipeline:
        accuracy = evaluate(pipeline, swapped).accuracy
    low, high = accuracy.interval
    return f"{100 * accuracy.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def add_common_options(parser: argparse.ArgumentParser, *, out: Path, budgets: list[str]) -> None:
    """Add what every comparison of bundles on generated questions needs."""
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--workers", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--budgets", nargs="*", choices=list(BUDGETS), default=budgets)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser, out=Path("out/accuracy"), budgets=list(BUDGETS))
    parser.add_argument("--skip", nargs="*", default=[], help="variants to leave out: words of their names")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    variants = [v for v in VARIANTS if not any(word in v.name for word in arguments.skip)]
    full, *others = measured(planned(variants, arguments), arguments)
    (arguments.out / "report.json").write_text(
        json.dumps([msgspec.to_builtins(run) for run in (full, *others)]), encoding="utf-8"
    )
    print(
        f"{arguments.model}, {arguments.count} held-out questions (seed {arguments.seed}), ONNX Runtime CPU (1 thread), float32,"
    )
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}; exact match in %, 95 % Wilson interval"
    )
    print(f"\nall visual tokens: {per_cent(full.accuracy)}; another sample's picture: {guesser(arguments)}\n")
    print("| selection | " + " | ".join(f"{name} %" for name in arguments.budgets) + " |")
    print("|---|" + "---|" * len(arguments.budgets))
    reports = iter(others)
    for variant in variants:
        cells = [per_cent(next(reports).accuracy) for _ in arguments.budgets]
        print(f"| {variant.name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
