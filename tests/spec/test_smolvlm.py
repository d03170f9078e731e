"""SmolVLM2's family: its vision graph in ONNX equals Hugging Face, its prompt's pieces are the processor's, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.bundles import export
from tests.pictures import random_picture
from tests.smolvlm_checkpoints import (
    IMAGE_ID,
    MOST_TILES,
    TILE_SIZE,
    TOKENS_PER_TILE,
    processor,
    save_smolvlm_checkpoint,
    tokenizer,
)
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import ALIASES, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families.smolvlm import SmolVlm
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE, build_messages, render_chat

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.images.interface import ImageProcessing

CAMERA = (101, 37)
SIZES = [CAMERA, (26, 26), (7, 9), (65, 63), (300, 41), (41, 300), (1, 90), (90, 1), (1, 1)]
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "image": build_messages("w1 w2", has_image=True),
    "text only": build_messages("w1 w2", has_image=False),
    "system": build_messages("w1", has_image=True, system="w3"),
    "history": build_messages(
        "w1",
        has_image=True,
        history=[{"role": "user", "content": "w2"}, {"role": "assistant", "content": "w3"}],
    ),
    "image after text": [
        {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image"}]},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_smolvlm_checkpoint(tmp_path_factory.mktemp("smolvlm") / "ck")


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageProcessing:
    return family_images(folder)


def family_images(folder: Path, *, max_visual: int | None = None) -> ImageProcessing:
    return SmolVlm().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=max_visual)


def changed(folder: Path, tmp_path: Path, file: str, change: dict[str, Any]) -> Path:
    """Return a copy of the checkpoint with other values in a file."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    return copy


# The vision graph


@pytest.fixture(scope="module")
def vision(folder: Path) -> ort.InferenceSession:
    bundle = open_bundle(export(folder))
    return ort.InferenceSession(bundle.path("vision.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_vision_graph_gives_the_features_of_hugging_face(
    folder: Path, images: ImageProcessing, vision: ort.InferenceSession, size: tuple[int, int]
) -> None:
    from transformers import SmolVLMForConditionalGeneration

    model = SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = images.prepare(random_picture(*size, seed=size[0]), images.any_image_sizes()[-1])
    used = images.sizes(*size)
    with torch.no_grad():
        pixels = torch.from_numpy(inputs["pixel_values"][: used["B"]])
        (theirs,) = model.get_image_features(pixels[None]).pooler_output
    (tokens,) = vision.run(None, inputs)
    assert tokens.shape[0] == len(inputs["token_index"])
    np.testing.assert_allclose(tokens[: used["N"]], theirs.numpy(), **LOGITS_FLOAT32)


def test_the_bundle_has_the_familys_image_processing(folder: Path, images: ImageProcessing) -> None:
    manifest = open_bundle(export(folder)).manifest
    assert image_processing(manifest.image_processing, encoder_keep=None) == images


# The prompt


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_text_between_the_runs_tokenizes_as_in_hugging_faces_processor(
    images: ImageProcessing, size: tuple[int, int]
) -> None:
    rendered = render_chat(build_messages("w1 w2", has_image=True), template=SMOLVLM_TEMPLATE)
    theirs = processor()(images=random_picture(*size), text=rendered, return_tensors="np")
    before, after = rendered.split("<image>")
    layout = images.layout(*size)
    first, *middle, last = layout.text
    ids: list[int] = []
    for piece, count in zip((before + first, *middle, last + after), (*layout.run_lengths, 0), strict=True):
        ids += [*tokenizer()(piece)["input_ids"], *[IMAGE_ID] * count]
    assert ids == theirs["input_ids"][0].tolist()
    assert theirs["pixel_values"].shape[1] == images.sizes(*size)["B"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_default_template_writes_what_hugging_faces_does(
    question: str, add_generation_prompt: bool
) -> None:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    ours, theirs = (
        render_chat(QUESTIONS[question], template=template, add_generation_prompt=add_generation_prompt)
        for template in (SMOLVLM_TEMPLATE, DEFAULT_CHAT_TEMPLATE)
    )
    assert ours == theirs


def test_a_checkpoint_without_a_template_gets_the_default(folder: Path) -> None:
    checkpoint = read_checkpoint(str(folder))
    template = SmolVlm().default_chat_template(checkpoint)
    text = read_text_files(checkpoint, default_template=template, image_marks=SmolVlm.image_marks)
    assert text.chat_template == SMOLVLM_TEMPLATE
    assert (text.spec.image_token, text.spec.bos_token) == ("<image>", "<|im_start|>")


@pytest.mark.parametrize("named", [True, False])
def test_marks_are_the_tokenizers_where_it_names_them(folder: Path, tmp_path: Path, named: bool) -> None:
    special = {"fake_image_token": "w1", "global_image_token": "w2"} if named else {}
    copy = changed(folder, tmp_path, "tokenizer_config.json", {"extra_special_tokens": special})
    marks = ("w1", "w2") if named else ("<fake_token_around_image>", "<global-img>")
    assert family_images(copy, max_visual=TOKENS_PER_TILE).layout(9, 9).text == (
        marks[0] + marks[1],
        marks[0],
    )


# Options and checkpoints


@pytest.mark.parametrize(
    ("max_visual", "tiles"), [(90, 10), (91, 10), (89, 5), (45, 5), (44, 1), (9, 1)], ids=str
)
def test_max_visual_limits_the_tiles(folder: Path, max_visual: int, tiles: int) -> None:
    limited = family_images(folder, max_visual=max_visual)
    assert limited.any_image_sizes()[-1] == {"B": tiles, "N": tiles * TOKENS_PER_TILE}
    longest_edge = {10: MOST_TILES, 5: 2, 1: 1}[tiles] * TILE_SIZE
    theirs = processor(longest_edge=longest_edge)  # what its users lower for fewer tiles
    picture = random_picture(*CAMERA)
    pixels = theirs(images=picture, text="<image>", return_tensors="np")["pixel_values"]
    assert limited.prepare(picture)["pixel_values"].shape == pixels[0].shape


def test_fewer_visual_tokens_than_a_tile_has_are_refused(folder: Path) -> None:
    with pytest.raises(
        ScheduleError, match=r"--max-visual: expected at least 9 \(one tile\), got 8; raise it"
    ):
        family_images(folder, max_visual=8)


def test_encoder_reduction_is_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="--encoder-keep: expected none for smolvlm, got 32"):
        SmolVlm().image_processing(read_checkpoint(str(folder)), encoder_keep=32, max_visual=None)


def test_features_of_a_class_token_are_refused(folder: Path, images: ImageProcessing) -> None:
    with pytest.raises(ScheduleError, match="expected one that needs no class token for smolvlm"):
        SmolVlm().build(read_checkpoint(str(folder)), processing=images, dtype="float32", with_features=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_factor": 4}, r"expected a scale_factor that divides 6 \(patches along a tile\), got 4"),
        ({"scale_factor": 0}, r"expected a scale_factor that divides 6 .*, got 0"),
        ({"text_config": {"model_type": "mistral"}}, "decoder of type llama, got 'mistral'"),
        ({"vision_config": {"image_size": [26, 26]}}, r"one number as vision image_size, got \[26, 26\]"),
        ({"vision_config": {"image_size": 48}}, r"expected max_image_size 48 \(the vision tower's\), got 26"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_followed_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    merged = {
        key: {**config[key], **value} if isinstance(value, dict) else value for key, value in change.items()
    }
    with pytest.raises(CheckpointError, match=message):
        family_images(changed(folder, tmp_path, "config.json", merged))


def test_a_processor_that_counts_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path, "processor_config.json", {"image_seq_len": 16})
    with pytest.raises(CheckpointError, match=r"expected image_seq_len 9 \(config.json\), got 16; make them"):
        family_images(copy)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.text_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.connector.modality_projection.proj.weight", "connector.modality_projection.proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight"),  # CLIP's
    ],
)
def test_tensors_have_canonical_names(name: str, ours: str) -> None:
    assert canonical_name(name) == ours


@pytest.mark.parametrize(
    ("size", "repository"),
    [("256m", "256M-Video-Instruct"), ("500m", "500M-Video-Instruct"), ("2.2b", "2.2B-Instruct")],
)
def test_aliases_name_the_published_checkpoints(size: str, repository: str) -> None:
    assert ALIASES[f"smolvlm2-{size}"].repository == f"HuggingFaceTB/SmolVLM2-{repository}"
