"""Held-out questions about drawn images, as ``examples/tiny_model/questions.py`` writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_model" / "questions.py"


def drawn_questions(count: int, *, seed: int = 0, several: bool = False) -> Path:
    """Return the file of questions below ``out/questions``; write it if it is not there."""
    name = f"{'several' if several else 'one'}-{count}-{seed}"
    path = Path("out") / "questions" / name / "questions.jsonl"
    if not path.exists():  # it is written after its images
        options = ["--count", str(count), "--seed", str(seed), *(["--several"] if several else [])]
        subprocess.run(
            [sys.executable, str(_SCRIPT), str(path.parent), *options], check=True, stdout=subprocess.DEVNULL
        )
    return path
