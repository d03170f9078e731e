"""Held-out questions about drawn images, as ``examples/tiny_model/questions.py`` and ``small_vlm/sentences.py`` write them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_VLM = "out/small-vlm"
"""The checkpoint that ``examples/small_vlm/package.py`` makes."""


def drawn_questions(count: int, *, seed: int = 0, several: bool = False) -> Path:
    """Return the file of the packaged model's questions below ``out/questions``; write it if it is not there."""
    name = f"{'several' if several else 'one'}-{count}-{seed}"
    return _written("tiny_model/questions.py", name, count, seed, *(["--several"] if several else []))


def drawn_sentences(count: int, *, seed: int = 0) -> Path:
    """Return the file of the small VLM's questions."""
    return _written("small_vlm/sentences.py", f"sentences-{count}-{seed}", count, seed)


def questions_for(model: str, count: int, *, seed: int = 0) -> Path:
    """Return the file of questions that ``model`` was trained for."""
    return (drawn_sentences if model == SMALL_VLM else drawn_questions)(count, seed=seed)


def _written(script: str, name: str, count: int, seed: int, *more: str) -> Path:
    path = Path("out") / "questions" / name / "questions.jsonl"
    if not path.exists():  # it is written after its images
        options = ["--count", str(count), "--seed", str(seed), *more]
        subprocess.run(
            [sys.executable, str(_EXAMPLES / script), str(path.parent), *options],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(_EXAMPLES / "tiny_model")},
        )
    return path
