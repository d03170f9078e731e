"""The small VLM: from its adapter to a checkpoint, a bundle, and an answer about an image."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_real_weights import GGUF
from tests.bundles import export
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "examples" / "pictures" / "shapes-96x96.png"


@pytest.mark.skipif(
    not GGUF.exists(), reason=f"needs {GGUF.name}, which `make test` gets from the package index; runs in CI"
)
def test_it_answers_in_a_sentence_and_chooses_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    # Another example has a module of this name.
    example = runpy.run_path(str(ROOT / "examples" / "small_vlm" / "package.py"))
    example["make_checkpoint"](example["ADAPTER"], tmp_path / "checkpoint", GGUF.parent)
    bundle = export(tmp_path / "checkpoint", max_new_tokens=16)
    with Pipeline.from_bundle(bundle) as pipeline:
        answer = pipeline.generate(PICTURE, "What color is the digit 3?")
        assert answer.text == "The digit 3 is green."
        sentences = [f"The digit 3 is {color}." for color in ("red", "green", "blue")]
        (decision,) = pipeline.decide(PICTURE, Question.choice("What color is the digit 3?", sentences))
        assert decision.choice == answer.text
        assert decision.label_mass > 0.9
