"""LFM2-VL through export and runtime: float16, engines, options, and what is refused.

``tests/several_images.py`` has the original processor's tokens and pixels, and compares whole answers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint, their_inputs, write_processor
from tests.matmul_flops import example_feeds, matmul_flops
from tests.pictures import random_picture
from tests.released_checkpoints import merged
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.families.lfm2 import Lfm2Vl
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lfm2_vl_checkpoint(tmp_path_factory.mktemp("lfm2_vl") / "ck")


def load(folder: Path) -> Any:
    from transformers import Lfm2VlForConditionalGeneration

    return Lfm2VlForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def family_images(folder: Path, *, max_visual: int | None = None) -> Any:
    return Lfm2Vl().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=max_visual)


def test_longer_convolutions_and_a_head_of_its_own_equal_hugging_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding reads more rows of a state than a prefill of text alone has after its begin."""
    folder = save_lfm2_vl_checkpoint(tmp_path / "ck", tie=False, num_layers=3, conv_L_cache=5)
    model = load(folder)
    with Pipeline.from_bundle(export(folder)) as pipeline:
        for picture in (random_picture(*CAMERA), None):
            messages = build_messages(PROMPT, images=[] if picture is None else [picture])
            inputs = their_inputs(pipeline, messages)
            assert_same_answer(
                model, pipeline, inputs, picture=picture, prompt=PROMPT, monkeypatch=monkeypatch
            )


def test_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    folder = save_lfm2_vl_checkpoint(tmp_path / "ck", num_layers=3, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder)) as pipeline:
        assert pipeline.manifest.dtype == "float16"
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPT, max_new_tokens=1)
        assert answer.text is not None
        inputs = their_inputs(pipeline, build_messages(PROMPT, images=[picture]))
        _, logits = generate(load(folder), inputs, num_steps=1)
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


def test_tensorrt_builds_every_graph_and_their_work_is_counted(folder: Path, tmp_path: Path) -> None:
    """The tower's are the formula's, and those of the embeddings of patches and positions, which it leaves out."""
    schedule = Schedule(stages=(Stage(layer=2, keep=20), Stage(layer=4, keep=9)))
    bundle = open_bundle(export(folder, schedule=schedule))
    assert set(build_here(bundle, tmp_path)) == {graph.name for graph in bundle.manifest.graphs}
    vision = next(graph for graph in bundle.manifest.graphs if graph.role == "vision")
    for profile in vision.profiles:
        counted = matmul_flops(bundle.path(vision.file), example_feeds(vision, profile))
        patches, width, values, table = 48 * profile.sizes["B"], 32, 3 * 4 * 4, 5 * 5
        more = 2 * patches * width * (values + table)
        assert counted == graph_work(bundle.manifest, vision, profile).flops + more


@pytest.mark.parametrize(("most", "tiles"), [(48, 5), (47, 4), (30, 3), (29, 1), (12, 1)])
def test_max_visual_limits_the_tiles(folder: Path, most: int, tiles: int) -> None:
    assert family_images(folder, max_visual=most).any_image_sizes()[-1]["B"] == tiles


def test_fewer_visual_tokens_than_a_tile_has_are_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match=r"--max-visual: expected at least 12 \(one tile\), got 11"):
        family_images(folder, max_visual=11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": {"conv_bias": True}}, "expected conv_bias false, got True; this variant"),
        ({"text_config": {"conv_L_cache": 1}}, "expected conv_L_cache at least 2, got 1"),
        ({"vision_config": {"num_channels": 1}}, "expected vision num_channels 3, got 1"),
        ({"vision_config": {"patch_size": 8}}, r"patch size and downsample_factor \(8, 2\) .* got \(4, 2\)"),
        ({"downsample_factor": 3}, r"patch size and downsample_factor \(4, 3\) .* got \(4, 2\)"),
        ({"text_config": {"model_type": "llama"}}, "expected a decoder of type lfm2, got 'llama'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_followed_are_refused(
    tmp_path: Path, folder: Path, change: dict[str, Any], message: str
) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "ck")
    config = merged(json.loads((copy / "config.json").read_text()), change)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        family_images(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_pad": False}, "preprocessor_config do_pad: expected true, got false"),
        ({"tile_size": 20}, r"tile_size: expected a multiple of 8 \(a visual token\), got 20"),
        ({"min_tiles": 1}, r"min_tiles: expected 2..max_tiles 4, got 1"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, "expected Lfm2VlImageProcessor, got"),
    ],
    ids=str,
)
def test_processors_that_cannot_be_followed_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = save_lfm2_vl_checkpoint(tmp_path / "ck", num_layers=1)
    write_processor(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        family_images(folder)


def test_a_prompt_without_marks_around_tiles_is_refused(tmp_path: Path) -> None:
    folder = save_lfm2_vl_checkpoint(tmp_path / "ck", num_layers=1)
    (folder / "processor_config.json").write_text(json.dumps({"use_image_special_tokens": False}))
    with pytest.raises(CheckpointError, match=r"expected use_image_special_tokens True .* got False"):
        family_images(folder)
