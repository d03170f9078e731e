"""Files of questions about random or drawn pictures, for tests of trio-eval and trio-calibrate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.pictures import random_picture

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_model" / "questions.py"
SIZES = ((48, 48), (60, 40), (40, 60))


def write_questions(folder: Path, lines: list[dict[str, Any]], *, name: str = "questions.jsonl") -> Path:
    """Write the pictures p0.png, p1.png, p2.png and a file with ``lines``; return the file."""
    for number, size in enumerate(SIZES):
        random_picture(*size, seed=number).save(folder / f"p{number}.png")
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def questions_about(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Return ``count`` lines about the three pictures in turn."""
    return [
        {"image": f"p{i % 3}.png", "question": f"w{i % 20} w{i % 7}", "answer": f"w{i % 50}", **fields}
        for i in range(count)
    ]


def drawn_questions(folder: Path, *options: str) -> Path:
    """Write held-out questions about drawn pictures, as the examples do; return the file."""
    subprocess.run([sys.executable, str(SCRIPT), str(folder), *options], check=True, capture_output=True)
    return folder / "questions.jsonl"
