"""A long prefill in chunks on the CPU: the answers of one pass, with less memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.pictures import random_picture
from tests.qwen_checkpoints import (
    CAMERA,
    HYBRID,
    KEEP_ALL,
    REDUCED,
    save_qwen3_5_checkpoint,
    save_qwen3_vl_checkpoint,
)
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.backends import chunked_prefill
from trio_edge.runtime.bundle.manifest import Profile
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.engines import cpu
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.answer import Generation

PICTURES = [random_picture(48, 48, seed=1), random_picture(70, 30, seed=2)]
STAGES = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
BEFORE = Schedule(stages=(Stage(layer=2, keep=6),), method="fastv")


@pytest.fixture(
    scope="module",
    params=[
        *("keep-all", "reduced", "int8 cache", "quantized", "reads the layer before", "deepstack"),
        *("states", "states, keep-all"),
    ],
)
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "deepstack":
        folder = save_qwen3_vl_checkpoint(tmp_path_factory.mktemp("qwen3") / "checkpoint")
        return export(folder, schedule=REDUCED, image_sizes=(CAMERA,))
    if request.param.startswith("states"):
        folder = save_qwen3_5_checkpoint(tmp_path_factory.mktemp("qwen3_5") / "checkpoint")
        return export(folder, schedule=HYBRID if request.param == "states" else KEEP_ALL)
    if request.param == "quantized":
        return export(checkpoint, schedule=STAGES, quantize=parse_plan("all=int4"))
    if request.param == "reads the layer before":
        return export(checkpoint, schedule=BEFORE)
    bundle: Path = request.getfixturevalue(f"{re.sub('[ -]', '_', request.param)}_bundle")
    return bundle


def _answers(bundle: Path) -> list[Generation]:
    with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
        return [
            _finished(pipeline.generate(picture, "w1 w2 w3", max_new_tokens=6)) for picture in PICTURES * 2
        ]


def _finished(answer: Any) -> Any:
    assert answer.text is not None
    return answer


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_chunks_give_the_answers_of_one_pass(
    rows: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a second question, when the buffers hold the rows of the one before; the last chunk is shorter.

    A quantized layer and its probe are one session, as in large graphs.
    """
    monkeypatch.setattr(cpu, "LARGE_GRAPH_BYTES", 0)
    whole = _answers(bundle)
    monkeypatch.setattr(chunked_prefill, "LARGEST_SCORES", 0)
    monkeypatch.setattr(chunked_prefill, "CHUNK_ROWS", rows)
    for one, other in zip(whole, _answers(bundle), strict=True):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.first_logits, other.first_logits, **LOGITS_FLOAT32)
        assert [stage.tolist() for stage in one.kept] == [stage.tolist() for stage in other.kept]


def test_only_a_prefill_with_large_scores_has_chunks(keep_all_bundle: Path) -> None:
    spec = open_bundle(keep_all_bundle).manifest.ranges[0]

    def has_chunks(rows: int, *, cached: int = 0) -> bool:
        profile = Profile(name="any", sizes={"S": rows, "C": cached})
        return chunked_prefill.has_long_prefill(spec, profile, num_heads=32)

    assert has_chunks(3136)
    assert not has_chunks(700)
    assert not has_chunks(1)
    assert not has_chunks(3136, cached=64)
    head = open_bundle(keep_all_bundle).manifest.graph("head")
    assert not chunked_prefill.has_long_prefill(head, Profile(name="any", sizes={"S": 9999}), num_heads=32)
