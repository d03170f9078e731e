"""Kept tokens and answers of the packaged model with an INT8 head, by the number of candidates in its proxy loss.

    python benchmarks/candidate_tokens.py --count 200 --candidates 2 4 8 16 64

The gradient of an exact head counts every token, that of a quantized one only the T likeliest (docs/quantization.md). Each T is
exported, asked the same held-out questions, and compared with the float32 head: shares of its kept tokens by stage. The last
row, an INT4 decoder, shows for scale what rounding weights does to the kept tokens.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from parts.arguments import parser_for, positive
from parts.tables import markdown

from trio_edge.calibration.questions import Question, synthetic_questions
from trio_edge.export.bundle import export_bundle
from trio_edge.export.options import ExportOptions
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.budgets import parse_keep, schedule_for_keep

_CONSTANT = "trio_edge.runtime.bundle.graph_io.MAX_CANDIDATES"


def answers(questions: list[Question], plan: str, candidates: int) -> tuple[int, list[list[set[int]]]]:
    """Return the number of right answers and each question's kept tokens by stage."""
    right, kept = 0, []
    with tempfile.TemporaryDirectory() as folder, mock.patch(_CONSTANT, candidates):
        bundle = Path(folder) / "bundle"
        options = ExportOptions(
            model="tiny",
            out=bundle,
            dtype="float32",
            max_text=32,
            max_new_tokens=8,
            quantize=parse_plan(plan),
        )
        export_bundle(
            options,
            schedule_for=lambda inputs: schedule_for_keep(
                parse_keep("11.1%"), num_layers=inputs.num_layers, num_visual=inputs.num_visual
            ),
        )
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            for question in questions:
                answer = pipeline.generate(list(question.images), question.question, max_new_tokens=4)
                right += answer.text.strip() in question.answers
                kept.append([set(stage.tolist()) for stage in answer.kept])
    return right, kept


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--count", type=positive, default=200)
    parser.add_argument("--candidates", type=positive, nargs="+", default=[2, 4, 8, 16, 64])
    options = parser.parse_args()
    questions = synthetic_questions(options.count, seed=0)
    exact_right, exact = answers(questions, "none", 64)
    rows = [("float32", "all 101", str(exact_right), "")]
    plans = [("head=int8", count) for count in options.candidates] + [("int4,head=int8", 64)]
    for plan, count in plans:
        right, kept = answers(questions, plan, count)
        shares = np.mean([[len(a & b) / len(a) for a, b in zip(*pair)] for pair in zip(exact, kept)], axis=0)
        rows.append((plan, str(count), str(right), " / ".join(f"{100 * share:.1f}" for share in shares)))
        print(rows[-1], flush=True)
    print(markdown(("quantized", "candidates", f"right of {options.count}", "kept too, %"), rows))


if __name__ == "__main__":
    main()
