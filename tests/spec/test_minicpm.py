"""MiniCPM-V 4.6 through export and runtime: float16, one merge, engines, options, and what is refused.

``tests/several_images.py`` has the original processor's tokens and pixels, and compares whole answers.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.matmul_flops import example_feeds, matmul_flops
from tests.minicpm_checkpoints import save_minicpm_checkpoint, their_inputs, write_processor
from tests.pictures import random_picture
from tests.released_checkpoints import merged
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.families.minicpm import MiniCpmV46
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import build_messages
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from pathlib import Path

CAMERA = (60, 45)
PROMPT = "w1 w2 w3"
OPTIONS: dict[str, Any] = {"max_text": 192}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_minicpm_checkpoint(tmp_path_factory.mktemp("minicpm") / "ck")


def load(folder: Path) -> Any:
    from transformers import MiniCPMV4_6ForConditionalGeneration

    return MiniCPMV4_6ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def family_images(folder: Path, *, max_visual: int | None = None) -> Any:
    return MiniCpmV46().image_processing(
        read_checkpoint(str(folder)), encoder_keep=None, max_visual=max_visual
    )


def test_patches_that_are_merged_once_and_a_head_of_its_own_equal_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``downsample_mode`` 4x leaves the merger inside the tower out; ``use_image_id`` false, the images' numbers."""
    folder = save_minicpm_checkpoint(tmp_path / "ck", tie=False, num_layers=4, downsample_mode="4x")
    write_processor(folder, downsample_mode="4x", use_image_id=False)
    model = load(folder)
    with Pipeline.from_bundle(export(folder, **OPTIONS)) as pipeline:
        for picture in (random_picture(*CAMERA), None):
            messages = build_messages(PROMPT, images=[] if picture is None else [picture])
            inputs = their_inputs(pipeline, messages)
            assert_same_answer(
                model, pipeline, inputs, picture=picture, prompt=PROMPT, monkeypatch=monkeypatch
            )


def test_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    folder = save_minicpm_checkpoint(tmp_path / "ck", num_layers=4, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder, **OPTIONS)) as pipeline:
        assert pipeline.manifest.dtype == "float16"
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPT, max_new_tokens=1)
        assert answer.text is not None
        inputs = their_inputs(pipeline, build_messages(PROMPT, images=[picture]))
        _, logits = generate(load(folder), inputs, num_steps=1)
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


def test_tensorrt_builds_every_graph_and_their_work_is_counted(folder: Path, tmp_path: Path) -> None:
    """The tower's work is the formula's, and that of the patches' embedding, which it leaves out."""
    schedule = Schedule(stages=(Stage(layer=3, keep=20), Stage(layer=7, keep=9)))
    bundle = open_bundle(export(folder, schedule=schedule, **OPTIONS))
    assert set(build_here(bundle, tmp_path)) == {graph.name for graph in bundle.manifest.graphs}
    vision = next(graph for graph in bundle.manifest.graphs if graph.role == "vision")
    for profile in vision.profiles:
        counted = matmul_flops(bundle.path(vision.file), example_feeds(vision, profile))
        patches, width, values = 16 * 12 * profile.sizes["B"], 36, 3 * 3 * 3
        assert counted == graph_work(bundle.manifest, vision, profile).flops + 2 * patches * width * values


@pytest.mark.parametrize(("most", "slices"), [(60, 5), (59, 4), (36, 3), (35, 1), (12, 1)])
def test_max_visual_limits_the_slices(folder: Path, most: int, slices: int) -> None:
    assert family_images(folder, max_visual=most).any_image_sizes()[-1]["B"] == slices


def test_fewer_visual_tokens_than_the_overview_has_are_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match=r"--max-visual: expected at least 12 \(the overview\), got 11"):
        family_images(folder, max_visual=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merger_times": 2}, "expected merger_times 1, got 2; this variant"),
        ({"insert_layer_id": 2}, r"expected insert_layer_id 0..1, got 2; this variant"),
        ({"merge_kernel_size": [2, 4]}, r"expected merge_kernel_size 2, 2, got"),
        ({"vision_config": {"window_kernel_size": [4, 4]}}, "expected window_kernel_size 2, 2, got"),
        ({"vision_config": {"num_channels": 1}}, "expected vision num_channels 3, got 1"),
        (
            {"vision_config": {"patch_size": 7}},
            r"patch_size and downsample_mode \(7, '16x'\) .* got \(3, '16x'\)",
        ),
        ({"downsample_mode": "4x"}, r"patch_size and downsample_mode \(3, '4x'\) .* got \(3, '16x'\)"),
        ({"text_config": {"model_type": "llama"}}, "expected a decoder of type qwen3_5_text, got 'llama'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_followed_are_refused(
    tmp_path: Path, folder: Path, change: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "ck")
    config = merged(json.loads((copy / "config.json").read_text()), change)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        family_images(copy)
