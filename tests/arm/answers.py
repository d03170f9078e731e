"""The demo's answers as JSON, and whether those of two processors are the same.

python -m tests.arm.answers BUNDLE
python -m tests.arm.answers --compare HERE THERE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from trio_edge.runtime.pipeline import Pipeline

PICTURES = Path(__file__).parents[2] / "examples" / "pictures"


def answers(bundle: str) -> list[dict[str, object]]:
    """Return each demo question's answer, ids, kept tokens and first logits."""
    found = []
    with Pipeline.from_bundle(bundle, backend="onnxruntime") as pipeline:
        for entry in json.loads((PICTURES / "questions.json").read_text(encoding="utf-8")):
            answer = pipeline.generate(PICTURES / entry["file"], entry["question"])
            text = answer.text
            kept = [stage.tolist() for stage in answer.kept]
            logits = answer.first_logits.tolist()
            found.append({"text": text, "ids": answer.token_ids, "kept": kept, "logits": logits})
    return found


def compare(here: str, there: str) -> int:
    """Print how two files of answers differ and return 1 if ids or kept tokens do."""
    ours, theirs = (json.loads(Path(file).read_text(encoding="utf-8")) for file in (here, there))
    same = [
        all(a[key] == b[key] for key in ("text", "ids", "kept")) for a, b in zip(ours, theirs, strict=True)
    ]
    apart = max(
        float(np.abs(np.subtract(a["logits"], b["logits"])).max()) for a, b in zip(ours, theirs, strict=True)
    )
    print(f"{sum(same)} of {len(same)} answers have the same ids and kept tokens, logits within {apart:.2g}")
    return int(not all(same))


if __name__ == "__main__":
    if sys.argv[1] == "--compare":
        sys.exit(compare(*sys.argv[2:]))
    print(json.dumps(answers(sys.argv[1])))
