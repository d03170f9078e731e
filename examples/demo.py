"""``make demo``: asks the packaged model about an image through an exported bundle, and draws the kept tokens.

Everything after the export runs without torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trio_edge.runtime.cli.run import main as trio_run

PICTURES = Path(__file__).parent / "pictures"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True, help="bundle of the packaged model, from trio-export tiny")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the drawing")
    parser.add_argument(
        "--question", type=int, default=0, help="number of a question in examples/pictures/questions.json"
    )
    arguments = parser.parse_args()
    entry = json.loads((PICTURES / "questions.json").read_text(encoding="utf-8"))[arguments.question]
    picture = PICTURES / entry["file"]
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawing = arguments.out / "kept.png"
    print(f"picture:  {picture.name}")
    print(f"question: {entry['question']}  (expected: {entry['answer']})")
    print(f"drawing:  {drawing} (the kept tokens of each stage)")
    print("answer:   ", end="", flush=True)
    question = ["--image", str(picture), "--prompt", entry["question"]]
    return trio_run([arguments.bundle, *question, "--show-kept", str(drawing)])


if __name__ == "__main__":
    raise SystemExit(main())
