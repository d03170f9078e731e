"""Kept tokens and answers of a small model by what the probes' gradient leaves out where weights are quantized.

    python benchmarks/probe_gradient.py --count 200 --candidates 2 4 8 16 64
    python benchmarks/probe_gradient.py --count 160 --candidates 64 --model out/small-vlm

A quantized head's gradient counts only the T likeliest tokens, and the gradient of a quantized layer goes around its MLP
(docs/quantization.md). Each variant is exported, asked the same held-out questions, and compared with float32: shares of its
kept tokens by stage. The last rows, with INT8 and INT4 layers, show for scale what rounding weights does.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from parts.arguments import parser_for, positive
from parts.drawn_questions import SMALL_VLM, questions_for
from parts.tables import markdown

from trio_edge.calibration.questions import Sample, read_questions
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.budgets import ScheduleRequest, parse_keep

_CANDIDATES = "trio_edge.runtime.bundle.graph_io.MAX_CANDIDATES"
_BEFORE_MLP = "trio_edge.trio.saliency.ProxySaliency._before_mlp"


class Variant(NamedTuple):
    """A way to quantize the model and its probes."""

    plan: str
    candidates: int = 64
    without_mlp: bool = False
    """Whether the gradient of layers in floating point goes around the MLP, too."""


def answers(
    model: str, questions: list[Sample], keep: str, variant: Variant
) -> tuple[int, list[list[set[int]]]]:
    """Return the number of right answers and each question's kept tokens by stage."""
    right, kept = 0, []
    with ExitStack() as stack:
        bundle = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "bundle"
        stack.enter_context(mock.patch(_CANDIDATES, variant.candidates))
        if variant.without_mlp:
            stack.enter_context(mock.patch(_BEFORE_MLP, lambda _self, gradient, *_: gradient))
        options = ExportOptions(
            model=model,
            out=bundle,
            dtype="float32",
            max_text=64,
            max_new_tokens=24,
            quantize=parse_plan(variant.plan),
            schedule=ScheduleRequest(average=parse_keep(keep)),
        )
        export_bundle(options)
        pipeline = stack.enter_context(Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1))
        for question in questions:
            answer = pipeline.generate(list(question.images), question.question, max_new_tokens=24)
            right += answer.text.strip() in question.answers
            kept.append([set(stage.tolist()) for stage in answer.kept])
    return right, kept


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--count", type=positive, default=200)
    parser.add_argument("--keep", default="11.1%")
    parser.add_argument("--candidates", type=positive, nargs="+", default=[2, 4, 8, 16, 64])
    parser.add_argument("--model", choices=["tiny", SMALL_VLM], default="tiny")
    options = parser.parse_args()
    questions = read_questions(questions_for(options.model, options.count))
    exact_right, exact = answers(options.model, questions, options.keep, Variant("none"))
    rows = [("float32", "all", str(exact_right), "")]
    variants = [Variant("none", without_mlp=True)]
    variants += [Variant("head=int8", count) for count in options.candidates]
    variants += [Variant("int8,head=int8"), Variant("int4,head=int8")]
    for variant in variants:
        right, kept = answers(options.model, questions, options.keep, variant)
        shares = np.mean([[len(a & b) / len(a) for a, b in zip(*pair)] for pair in zip(exact, kept)], axis=0)
        name = "float32, around the MLP" if variant.without_mlp else variant.plan
        candidates = "all" if variant.plan == "none" else str(variant.candidates)
        rows.append((name, candidates, str(right), " / ".join(f"{100 * share:.1f}" for share in shares)))
        print(rows[-1], flush=True)
    print(markdown(("quantized", "candidates", f"right of {options.count}", "kept too, %"), rows))


if __name__ == "__main__":
    main()
