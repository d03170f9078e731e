"""Stores the answers that ``trio-check`` expects: those of the packaged bundle, by ONNX Runtime on the CPU.

    python benchmarks/record_check.py

Fails if a float32 bundle keeps other tokens or gives another answer, because rounding would decide such a question.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
from parts.arguments import errors_in_one_line, parser_for

from trio_edge.export.cli import main as trio_export
from trio_edge.profiling.check.answers import (
    EXPECTED,
    EXPORT_OPTIONS,
    QUESTIONS,
    AnswerRecord,
    answer,
    exact_difference,
)
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.pipeline import Pipeline

DIGITS = 5


def main() -> None:
    parser = parser_for(__doc__)
    parser.parse_args()
    with errors_in_one_line(parser), tempfile.TemporaryDirectory() as folder:
        stored, exact = (answers(Path(folder) / dtype, dtype) for dtype in ("float16", "float32"))
        for one, other in zip(stored, exact):
            if (difference := exact_difference(one, other)) is not None:
                raise DataError(
                    f"{one.prompt!r}: expected float16 and float32 to agree, got: {difference}; choose"
                    " another question"
                )
    EXPECTED.write_bytes(msgspec.json.format(msgspec.json.encode(stored), indent=0) + b"\n")
    print(f"{EXPECTED}: {', '.join(f'{one.prompt} {one.text}' for one in stored)}")


def answers(bundle: Path, dtype: str) -> list[AnswerRecord]:
    if trio_export(["tiny", "--out", str(bundle), "--dtype", dtype, *EXPORT_OPTIONS]) != 0:
        raise SystemExit(1)
    with Pipeline.from_bundle(bundle, backend="onnxruntime") as pipeline:
        return [
            msgspec.structs.replace(one, logits=[round(value, DIGITS) for value in one.logits])
            for one in answer(pipeline, QUESTIONS)
        ]


if __name__ == "__main__":
    main()
