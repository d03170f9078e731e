"""A real language model through exported graphs: its answers and next tokens against Hugging Face's, in two formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from real_formats import ANSWER_TOKENS, Reading, read_by_bundle, read_by_hugging_face
from real_weights.checkpoints import GGUF_NAME, OUT, write_checkpoint

from tests.bundles import export
from tests.shared_folder import made_once
from trio_edge.export.quantize.plan import parse_plan

GGUF = Path(__file__).parents[2] / OUT / GGUF_NAME
SIZES = {"length": 16, "num_questions": 1}
pytestmark = pytest.mark.skipif(
    not GGUF.exists(),
    reason=f"needs {OUT / GGUF_NAME}, which `make test` gets from the package index; runs in CI",
)


@pytest.fixture(scope="module")
def real_checkpoint() -> Path:
    return made_once("real-weights", lambda out: write_checkpoint("llava", GGUF, out))


@pytest.fixture(scope="module")
def exact(real_checkpoint: Path) -> Reading:
    return read_by_hugging_face(real_checkpoint, **SIZES)


def _read(checkpoint: Path, plan: str, *, dtype: str) -> Reading:
    bundle = export(checkpoint, dtype=dtype, max_new_tokens=ANSWER_TOKENS, quantize=parse_plan(plan))
    return read_by_bundle(bundle, **SIZES, cpu_accuracy="float32")


def test_float32_reads_and_answers_as_hugging_face_does(real_checkpoint: Path, exact: Reading) -> None:
    one = _read(real_checkpoint, "none", dtype="float32")
    assert exact.answers == ["The capital of France is Paris."]
    assert one.answers == exact.answers
    assert one.likeliest == exact.likeliest
    np.testing.assert_allclose(one.log_probs, exact.log_probs, atol=1e-3)


def test_int8_in_float16_keeps_the_answer_and_nearly_all_next_tokens(
    real_checkpoint: Path, exact: Reading
) -> None:
    one = _read(real_checkpoint, "int8,head=int8", dtype="float16")
    assert one.answers == exact.answers
    assert np.mean(np.equal(one.likeliest, exact.likeliest)) >= 0.9
    assert abs(np.mean(one.log_probs) - np.mean(exact.log_probs)) <= 0.1
