"""Effect of quantizing a small model on size, accuracy, divergence from keep-all, and the kept tokens.

    python benchmarks/quantized_answers.py --count 500 --out out/quantized
    python benchmarks/quantized_answers.py --count 160 --model out/small-vlm --out out/quantized-small    # --keep all

Exports each bundle once into the output folder, asks all of them the same held-out questions through `trio-eval`'s code, and
prints one Markdown table; the same command continues an interrupted run. "Minus float32" compares with float32 at the same budget.
"Kept too" is the share of the float32 bundle's kept tokens that a bundle keeps, by stage. The lines with only ``select`` quantized
show the effect of the probe's precision.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ablation import against_default
from parts.arguments import parser_for
from parts.asking import METRIC, answers_of
from parts.drawn_questions import SMALL_VLM, questions_for
from parts.tables import markdown

from trio_edge.calibration.evaluate.comparison import RunReport, compare
from trio_edge.calibration.evaluate.report import per_cent
from trio_edge.calibration.evaluate.runs import plan_runs
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.calibrating import calibrate_quantization
from trio_edge.calibration.questions import read_questions
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.backends.registry import CPU_ACCURACIES
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.budgets import ScheduleRequest, parse_keep

if TYPE_CHECKING:
    from trio_edge.calibration.questions import Sample
    from trio_edge.runtime.bundle.manifest import FloatType
    from trio_edge.runtime.engines.cpu import CpuAccuracy


@dataclass(frozen=True)
class Variant:
    """One line of the table."""

    name: str
    plan: str | None = None
    """Value of ``--quantize``."""
    dtype: FloatType = "float16"
    is_calibrated: bool = False
    """Whether factors and ranges come from samples."""


CALIBRATION_SEED = 1000
BASE = Variant("float32", dtype="float32")
VARIANTS = (
    BASE,
    Variant("float16"),
    Variant("float16, KV caches int8", "kv=int8", is_calibrated=True),
    Variant("int8 decoder", "int8"),
    Variant("int8 all graphs", "all=int8"),
    Variant("int8 decoder, SmoothQuant", "int8", is_calibrated=True),
    Variant("int8 vision, SmoothQuant", "vision=int8", is_calibrated=True),
    Variant("int8 all graphs, SmoothQuant", "all=int8", is_calibrated=True),
    Variant("fp8 decoder, calibrated", "fp8", is_calibrated=True),
    Variant("fp8 all graphs", "all=fp8"),
    Variant("fp8 all graphs, calibrated", "all=fp8", is_calibrated=True),
    Variant("int4 decoder", "int4"),
    Variant("int4 decoder, suffix int8", "int4,suffix=int8"),
    Variant("int4 decoder, AWQ", "int4", is_calibrated=True),
    Variant("int4 decoder, AWQ, 10 % of columns float16", "int4,outliers=10%", is_calibrated=True),
    Variant("int4 decoder, AWQ, int8 vision, SmoothQuant", "int4,vision=int8", is_calibrated=True),
    Variant("int4 all graphs but select", "all=int4,select=none"),
    Variant("int4 all graphs", "all=int4"),
    Variant("int4 all graphs, AWQ", "all=int4", is_calibrated=True),
    Variant("int4 all graphs, table int8", "all=int4,embedding=int8"),
    Variant("select int8 only", "select=int8"),
    Variant("select int4 only", "select=int4"),
)


def request_for(keep: str) -> ScheduleRequest:
    return ScheduleRequest(average=None if keep == "all" else parse_keep(keep))


def bundle_for(variant: Variant, *, model: str, keep: str, samples: int, out: Path) -> Path:
    """Return the bundle of a variant; export it if needed."""
    path = out / f"{keep.rstrip('%')}-{variant.name.replace(' ', '-').replace(',', '')}"
    if not path.exists():
        options = ExportOptions(
            model=model,
            out=path,
            schedule=request_for(keep),
            dtype=variant.dtype,
            max_text=64 if model == SMALL_VLM else 32,
            max_new_tokens=24 if model == SMALL_VLM else 8,
            quantize=parse_plan(variant.plan or "none"),
        )
        scales = CalibratedScales()
        if variant.is_calibrated:
            scales = calibrated_scales(variant, model, keep=keep, samples=samples)
        export_bundle(options, scales=scales)
    return path


def calibrated_scales(variant: Variant, name: str, *, keep: str, samples: int) -> CalibratedScales:
    """Return the scales from a calibration of the model ``name`` on other samples than the questions."""
    model = load_model(name)
    num_visual = max(sizes["N"] for sizes in model.images.any_image_sizes())
    schedule = request_for(keep).schedule(
        num_layers=model.num_layers, num_visual=num_visual, positions=model.positions
    )
    found = calibrate_quantization(
        model,
        read_questions(questions_for(name, samples, seed=CALIBRATION_SEED)),
        schedule,
        parse_plan(variant.plan or "none"),
        dtype=variant.dtype,
        num_tokens=12 if name == SMALL_VLM else 4,
    )
    assert found is not None
    return found.scales


def weight_bytes(bundle: Path) -> int:
    """Return the bytes of the bundle's weight files, each tensor once."""
    return sum(
        entry.num_bytes for entry in open_bundle(bundle).manifest.files if entry.path.endswith(".safetensors")
    )


def kept_sets(
    bundle: Path, questions: list[Sample], *, cpu_accuracy: CpuAccuracy = "auto"
) -> list[list[set[int]]]:
    """Return each stage's kept tokens for each question."""
    result = []
    with Pipeline.from_bundle(bundle, threads=1, cpu_accuracy=cpu_accuracy) as pipeline:
        for question in questions:
            generation = pipeline.generate(list(question.images), question.question, max_new_tokens=1)
            assert generation.text is not None
            result.append([set(kept.tolist()) for kept in generation.kept])
    return result


def overlaps(theirs: list[list[set[int]]], ours: list[list[set[int]]]) -> list[float]:
    """Return by stage the mean share of ``theirs`` that is in ``ours``."""
    shares = [[len(a & b) / len(a) for a, b in zip(one, other)] for one, other in zip(theirs, ours)]
    return [float(mean) for mean in np.mean(shares, axis=0)]


def cells_of(
    variant: Variant, bundle: Path, report: RunReport, other: RunReport, kept: list[float]
) -> tuple[str, ...]:
    against, exact = report.against_reference, other.against_reference
    assert against is not None
    return (
        variant.name,
        f"{weight_bytes(bundle) / 1e6:.2f}",
        per_cent(report.accuracy),
        per_cent(against.difference, signed=True),
        "" if exact is None else per_cent(exact.difference, signed=True),
        f"{100 * against.agreement.value:.1f}",
        "" if against.first_token_kl is None else f"{against.first_token_kl:.4f}",
        " / ".join(f"{100 * share:.1f}" for share in kept),
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--kept-count", type=int, default=100, help="questions whose kept sets are compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", choices=["tiny", SMALL_VLM], default="tiny")
    parser.add_argument("--keep", default="11.1%", help='"all" or a share')
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only float32 and these rows")
    parser.add_argument("--samples", type=int, default=64, help="for calibrations")
    parser.add_argument("--cpu-accuracy", choices=CPU_ACCURACIES, default="auto", help="trio-run's option")
    parser.add_argument("--out", type=Path, default=Path("out/quantized"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    wanted = {BASE.name, *(arguments.rows or [variant.name for variant in VARIANTS])}
    if arguments.keep == "all":
        wanted.remove(BASE.name)  # it is what the others are compared with
    variants = [variant for variant in VARIANTS if variant.name in wanted]
    made = {"model": arguments.model, "out": arguments.out}
    full = bundle_for(BASE, keep="all", samples=arguments.samples, **made)
    bundles = [
        bundle_for(variant, keep=arguments.keep, samples=arguments.samples, **made) for variant in variants
    ]
    runs = plan_runs(bundles, reference=full, labels=[variant.name for variant in variants])
    accuracy = arguments.cpu_accuracy
    answers = answers_of(runs, count=arguments.count, seed=arguments.seed, cpu_accuracy=accuracy, **made)
    keep_all, *reports = compare(answers, metric=METRIC)
    others = reports if arguments.keep == "all" else against_default(answers)[1]
    looked_at = read_questions(
        questions_for(arguments.model, arguments.count, seed=arguments.seed), count=arguments.kept_count
    )
    base_kept = kept_sets(full if arguments.keep == "all" else bundles[0], looked_at)

    print(
        f"{arguments.model}, {arguments.keep} of the visual tokens, {arguments.count} held-out questions (seed {arguments.seed}),"
        f" ONNX Runtime CPU (1 thread, {accuracy}), {platform.machine()}; keep-all in float32: {per_cent(keep_all.accuracy)}\n"
    )
    figures = ("accuracy %", "minus keep-all", "minus float32", "same answer %", "KL, nats", "kept too %")
    rows = [
        cells_of(
            variant,
            bundle,
            report,
            other,
            overlaps(base_kept, kept_sets(bundle, looked_at, cpu_accuracy=accuracy)),
        )
        for variant, bundle, report, other in zip(variants, bundles, reports, others, strict=True)
    ]
    print(markdown(("quantized", "weights MB", *figures), rows))


if __name__ == "__main__":
    main()
