"""InternVL3 and InternVL3.5 through export and runtime: keep-all equals Hugging Face, reduced equals plain torch."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.internvl_checkpoints import IMAGE_ID, TOKENS_PER_TILE, processor, save_internvl_checkpoint
from tests.pictures import random_picture
from tests.spec.reduced_reference import reduced_logits
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import ALIASES, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families.internvl import InternVl
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import INTERNVL_TEMPLATE, build_messages, render_chat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REDUCED = Schedule(stages=(Stage(layer=1, keep=13), Stage(layer=2, keep=5)))
CAMERA = (101, 37)
SIZES = [CAMERA, (32, 32), (7, 9), (65, 63), (300, 41), (41, 300), (1, 90)]
PROMPTS = ["w1 w2 w3", "w5 w4 w3 w2 w1 w0 w7 w7"]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternVL3, and InternVL3.5, whose decoder normalizes the heads of queries and keys."""
    return save_internvl_checkpoint(tmp_path_factory.mktemp("internvl") / "ck", text_type=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def keep_all(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(folder)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reduced(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(reduced_bundle(folder)) as pipeline:
        yield pipeline


def load(folder: Path) -> Any:
    from transformers import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def reduced_bundle(folder: Path) -> Path:
    return export(folder, schedule=REDUCED, image_sizes=(CAMERA,))


def hugging_face_inputs(
    pipeline: Pipeline, picture: Any, prompt: str, **images: int
) -> dict[str, torch.Tensor]:
    """Return what Hugging Face's processor gives, with the runtime's pixels, which have tests of their own."""
    theirs = processor()
    content = [{"type": "image"}] if picture is not None else []
    text = theirs.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
    )
    inputs = dict(theirs(images=picture, text=text, return_tensors="pt", **images))
    if picture is not None:
        sizes = pipeline.images.sizes(*picture.size)
        pixels = torch.from_numpy(pipeline.images.prepare(picture, sizes)["pixel_values"])
        assert pixels.shape == inputs["pixel_values"].shape
        inputs["pixel_values"] = pixels
    return inputs


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    model: Any, keep_all: Pipeline, size: tuple[int, int], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = random_picture(*size, seed=size[0])
    inputs = hugging_face_inputs(keep_all, picture, prompt)
    assert_same_answer(model, keep_all, inputs, picture=picture, prompt=prompt, monkeypatch=monkeypatch)


def test_text_only_equals_hugging_face(
    model: Any, keep_all: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = hugging_face_inputs(keep_all, None, PROMPTS[0])
    assert_same_answer(model, keep_all, inputs, picture=None, prompt=PROMPTS[0], monkeypatch=monkeypatch)


@pytest.mark.parametrize("size", [CAMERA, (65, 63), (20, 300), (7, 9)], ids=str)
def test_reduced_bundle_equals_plain_torch(model: Any, reduced: Pipeline, size: tuple[int, int]) -> None:
    picture, prompt = random_picture(*size, seed=3), "w1 w2 w3 w4 w5 w6"
    inputs = hugging_face_inputs(reduced, picture, prompt)
    answer = reduced.generate(picture, prompt, max_new_tokens=1)
    _ = answer.text
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"]).pooler_output.flatten(0, 1)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    spots = inputs["input_ids"][0] == IMAGE_ID
    embeds[0, spots] = features
    logits, kept = reduced_logits(model, embeds, REDUCED, visual=spots.nonzero()[:, 0].tolist())
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_the_camera_has_no_padding(reduced: Pipeline) -> None:
    prepared = reduced._level.vision.prepare(random_picture(*CAMERA), PROMPTS[0])
    assert len(prepared.inputs["token_index"]) == prepared.layout.num_visual == 4 * TOKENS_PER_TILE
    assert len(prepared.inputs["pixel_values"]) == 4


def test_the_thumbnail_is_drawn_as_an_overview(reduced: Pipeline) -> None:
    picture = random_picture(*CAMERA)
    answer = reduced.generate(picture, PROMPTS[0], max_new_tokens=1)
    _ = answer.text
    overview = reduced.images.layout(*picture.size).overview
    np.testing.assert_allclose(answer.boxes[overview[0], :2], 0)
    np.testing.assert_allclose(answer.boxes[overview[-1], 2:], CAMERA)
    assert len(answer.boxes) == overview.stop == 4 * TOKENS_PER_TILE


def test_marks_stand_around_the_picture_as_hugging_faces_processor_puts_them(keep_all: Pipeline) -> None:
    ids = keep_all._encode(build_messages(PROMPTS[0], images=[None]))
    theirs = hugging_face_inputs(keep_all, random_picture(32, 32), PROMPTS[0])["input_ids"][0]
    assert [*ids.before, *[IMAGE_ID] * TOKENS_PER_TILE, *ids.after] == theirs.tolist()


@pytest.mark.parametrize("own_template", [False, True], ids=["default", "of_the_checkpoint"])
def test_the_bundles_template_writes_the_marks(folder: Path, tmp_path: Path, own_template: bool) -> None:
    checkpoint = with_template(folder, tmp_path, INTERNVL_TEMPLATE) if own_template else folder
    text = read_text_files(
        read_checkpoint(str(checkpoint)),
        default_template=INTERNVL_TEMPLATE,
        image_marks=InternVl.image_marks,
    )
    rendered = render_chat(build_messages("w1", images=[None], system="w2"), template=text.chat_template)
    assert rendered == (
        "<|im_start|>system\nw2<|im_end|>\n"
        "<|im_start|>user\n<img><IMG_CONTEXT></img>\nw1<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_with_another_image_token_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = with_template(folder, tmp_path, "{{ '<image>' }}")
    with pytest.raises(
        CheckpointError, match="expected a chat template with the image token '<IMG_CONTEXT>'"
    ):
        export(checkpoint)


def with_template(folder: Path, tmp_path: Path, template: str) -> Path:
    copy = shutil.copytree(folder, tmp_path / "with_template")
    (copy / "chat_template.jinja").write_text(template)
    return copy


def test_a_head_in_the_checkpoint_is_used_although_transformers_ties_by_default(
    folder: Path, model: Any
) -> None:
    assert "tie_word_embeddings" not in json.loads((folder / "config.json").read_text())
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    bundle = open_bundle(export(folder))
    head = onnx.load(bundle.path("head.onnx"), load_external_data=False).graph.initializer
    offsets = {entry.value for tensor in head for entry in tensor.external_data if entry.key == "offset"}
    assert len(offsets) == 2  # norm and head
    assert str(bundle.manifest.token_embedding.offset) not in offsets


def test_every_graph_is_built_by_tensorrt(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(reduced_bundle(folder))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


def test_tied_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    folder = save_internvl_checkpoint(tmp_path / "ck", tie=True, num_layers=1, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder, max_visual=TOKENS_PER_TILE)) as pipeline:
        assert (pipeline.manifest.dtype, pipeline.manifest.max_visual) == ("float16", TOKENS_PER_TILE)
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        _, logits = generate(load(folder), hugging_face_inputs(pipeline, picture, PROMPTS[0], max_patches=1))
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


def test_max_visual_limits_the_tiles(folder: Path) -> None:
    checkpoint = read_checkpoint(str(folder))
    limited = InternVl().image_processing(checkpoint, encoder_keep=None, max_visual=4 * TOKENS_PER_TILE + 3)
    assert limited.to_dict()["max_tiles"] == 3
    assert limited.any_image_sizes()[-1]["N"] == 4 * TOKENS_PER_TILE


def test_fewer_visual_tokens_than_a_tile_has_are_refused(folder: Path) -> None:
    with pytest.raises(
        ScheduleError, match=r"--max-visual: expected at least 16 \(1 tiles of 16\), got 15; raise it"
    ):
        export(folder, max_visual=TOKENS_PER_TILE - 1)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_aliases_name_the_published_checkpoints(size: int) -> None:
    assert ALIASES[f"internvl3-{size}b"].repository == f"OpenGVLab/InternVL3-{size}B-hf"


@pytest.mark.parametrize("prefix", ["", "model."], ids=["old", "new"])
def test_names_of_old_and_new_releases_are_one(prefix: str) -> None:
    layer = "vision_tower.encoder.layer.0.lambda_1"
    assert canonical_name(prefix + layer) == layer
    assert (
        canonical_name(f"{prefix}multi_modal_projector.linear_1.weight")
        == "multi_modal_projector.linear_1.weight"
    )


def test_encoder_reduction_is_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="--encoder-keep: expected none for internvl, got 32"):
        export(folder, encoder_keep=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, "expected vision_feature_layer -1, got -2"),
        ({"vision_feature_select_strategy": "full"}, "select_strategy 'default', got 'full'"),
        ({"downsample_ratio": 0.4}, r"expected downsample_ratio 1 / n with n dividing 8 .* got 0.4"),
        (
            {"text_config": {"model_type": "qwen3_moe"}},
            "decoder of type qwen2, qwen3, llama, got 'qwen3_moe'",
        ),
        (
            {"vision_config": {"model_type": "internvl_vision", "image_size": [32, 64]}},
            "square vision image_size",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_that_cannot_be_followed_are_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    checkpoint = read_checkpoint(str(folder))
    original = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({**json.loads(original), **change}))
    try:
        with pytest.raises(CheckpointError, match=message):
            InternVl().image_processing(checkpoint, encoder_keep=None, max_visual=None)
    finally:
        (folder / "config.json").write_text(original)
