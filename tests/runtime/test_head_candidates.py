"""The gradient of a quantized head: its likeliest tokens, and their rows of the lm_head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from tests.schedules import schedule_for
from trio_edge.export.checkpoints.checkpoint import TINY_FOLDER
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.bundle.reader import TokenTable, open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.head_candidates import ordered
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import Manifest

EPSILON = 1e-5
"""Epsilon of the packaged model's final norm."""


@pytest.fixture(scope="module")
def tiny() -> Path:
    """The packaged model, which has 101 tokens, with an INT8 head."""
    schedule = schedule_for(
        0.111, num_layers=16, num_visual=192
    )  # that of other tests, which share the traces
    return export("tiny", schedule=schedule, quantize=parse_plan("head=int8"))


def _gradient(output: NDArray[Any], table: NDArray[Any], norm: NDArray[Any], *, count: int) -> NDArray[Any]:
    """Return the gradient [R, D] of the mean loss over the ``count`` likeliest tokens, in float64."""
    found = []
    for row in output.astype(np.float64):
        scale = 1.0 / np.sqrt(np.mean(row * row) + EPSILON)
        logits = table @ (row * scale * norm)
        ids = np.argsort(-logits, kind="stable")[:count]
        others = np.exp(logits[ids] - logits[ids[0]])
        others /= others.sum()
        others[0] -= 1.0
        normed = others @ table[ids] * norm
        found.append(scale * (normed - row * scale * np.mean(row * scale * normed)) / len(output))
    return np.array(found)


def _norm() -> NDArray[Any]:
    """Return the final norm's weight."""
    tensors = load_file(TINY_FOLDER / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("model.norm.weight"))
    return tensors[name].astype(np.float64)


def test_gradient_is_that_of_the_loss_over_the_likeliest_tokens(tiny: Path) -> None:
    bundle = open_bundle(tiny)
    manifest = bundle.manifest
    assert manifest.head_rows is not None and manifest.dimensions.vocab_size > graph_io.MAX_CANDIDATES
    table = TokenTable(bundle, manifest.head_rows, manifest.head_row_scales)[np.arange(101)].astype(
        np.float64
    )
    with Pipeline.from_bundle(tiny, backend="onnxruntime", threads=1) as pipeline:
        assert pipeline.generate(random_picture(96, 96), "what color ?", max_new_tokens=1).text is not None
        memory, device = pipeline._level.decoder._memory, pipeline._graphs.device
        output, gradient = (memory.tensor(f"probe.{name}") for name in ("probe_output", "output_gradient"))
        rows, found = np.empty(output.shape, np.float32), np.empty(gradient.shape, np.float32)
        device.download(rows, output)
        device.download(found, gradient)
        device.synchronize()
        expected = _gradient(rows, table, _norm(), count=graph_io.MAX_CANDIDATES)
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-3)


def test_a_quantized_head_keeps_nearly_the_tokens_of_an_exact_one(tiny: Path) -> None:
    schedule = open_bundle(tiny).manifest.schedule
    image = random_picture(96, 96)
    kept = []
    for bundle in (tiny, export("tiny", schedule=schedule)):
        with Pipeline.from_bundle(bundle, backend="onnxruntime", threads=1) as pipeline:
            answer = pipeline.generate(image, "what color ?", max_new_tokens=1)
            assert answer.text is not None
            kept.append([set(stage.tolist()) for stage in answer.kept])
    assert [stage.keep for stage in schedule.stages] == [20, 12, 4]
    for least, exact, quantized in zip((18, 9, 3), *kept):
        assert len(exact & quantized) >= least


def test_equal_logits_are_ordered_by_token() -> None:
    logits = np.array([[3.0, 3.0, 1.0, 1.0], [5.0, 4.0, 4.0, 4.0]], np.float32)
    ids = np.array([[9, 2, 7, 1], [3, 8, 6, 7]], np.int32)
    found, tokens = ordered(logits, ids)
    assert found.tolist() == logits.tolist()
    assert tokens.tolist() == [[2, 9, 1, 7], [3, 6, 7, 8]]


@pytest.mark.parametrize("tie", [True, False])
def test_rows_of_a_tied_head_are_the_embeddings(tie: bool, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "checkpoint", num_layers=2, tie=tie)
    schedule = Schedule(stages=(Stage(layer=1, keep=8),))
    manifest = open_bundle(export(checkpoint, schedule=schedule, quantize=parse_plan("head=int8"))).manifest
    assert manifest.head_rows is not None
    assert (manifest.head_rows == manifest.token_embedding) == tie
    assert (manifest.head_row_scales is None) == tie
    assert manifest.head_rows.dtype == ("float32" if tie else "int8")


def test_a_head_that_int4_cannot_store_keeps_its_exact_gradient() -> None:
    """The packaged model has an odd number of tokens."""
    schedule = Schedule(stages=(Stage(layer=1, keep=20),))
    manifest = open_bundle(export("tiny", schedule=schedule, quantize=parse_plan("head=int4"))).manifest
    assert manifest.head_rows is None
    assert [piece.name for piece in manifest.graph("head").pieces] == ["logits", "gradient"]


@pytest.mark.parametrize("fields", [{"head_rows": None}, {"head_rows": None, "head_row_scales": None}])
def test_a_manifest_without_the_rows_is_refused(fields: dict[str, Any], tiny: Path) -> None:
    manifest: Manifest = msgspec.structs.replace(open_bundle(tiny).manifest, **fields)
    with pytest.raises(ManifestError, match=r"expected head_rows .* got none; export the bundle again"):
        manifest_from_json(json_from_manifest(manifest), where="trio.json")
