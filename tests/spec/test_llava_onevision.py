"""LLaVA-OneVision through export and runtime: keep-all equals Hugging Face, reduced equals plain torch."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.onevision_checkpoints import (
    IMAGE_ID,
    PINPOINTS,
    TEMPLATE,
    TILE_SIZE,
    TOKENS_PER_TILE,
    processor,
    save_onevision_checkpoint,
)
from tests.pictures import random_picture
from tests.spec.reduced_reference import reduced_logits
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import ALIASES, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families.llava import LlavaOnevision
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import LLAVA_ONEVISION_TEMPLATE, build_messages, render_chat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REDUCED = Schedule(stages=(Stage(layer=1, keep=9),))
CAMERA = (101, 67)
MADE_SMALLER = [CAMERA, (300, 290), (64, 99), (53, 78)]
SIZES = [*MADE_SMALLER, (26, 26), (7, 9), (300, 41), (1, 90), (3, 1)]
PROMPTS = ["w1 w2 w3", "w5 w4 w3 w2 w1 w0 w7 w7"]
NUM_STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_onevision_checkpoint(tmp_path_factory.mktemp("onevision") / "ck")


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
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def reduced_bundle(folder: Path) -> Path:
    return export(folder, schedule=REDUCED, image_sizes=(CAMERA,))


def hugging_face_inputs(
    pipeline: Pipeline, picture: Any, prompt: str, *, pinpoints: list[list[int]] = PINPOINTS
) -> dict[str, torch.Tensor]:
    """Return what Hugging Face's processor gives, with the runtime's pixels, which have tests of their own."""
    theirs = processor(pinpoints)
    content = [{"type": "image"}] if picture is not None else []
    text = theirs.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
    )
    inputs = dict(theirs(images=picture, text=text, return_tensors="pt"))
    if picture is not None:
        sizes = pipeline.images.sizes(*picture.size)
        pixels = torch.from_numpy(pipeline.images.prepare(picture, sizes)["pixel_values"])[None]
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
    assert_same_answer(
        model, keep_all, inputs, picture=picture, prompt=prompt, monkeypatch=monkeypatch, num_steps=NUM_STEPS
    )


def test_large_pictures_here_are_made_smaller(keep_all: Pipeline) -> None:
    weights = [keep_all.images.prepare(random_picture(*size))["token_weights"] for size in SIZES]
    is_smaller = [bool((of_size[:, 0] < 1).any()) for of_size in weights]
    assert is_smaller == [size in MADE_SMALLER for size in SIZES]


def test_text_only_equals_hugging_face(
    model: Any, keep_all: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = hugging_face_inputs(keep_all, None, PROMPTS[0])
    assert_same_answer(
        model, keep_all, inputs, picture=None, prompt=PROMPTS[0], monkeypatch=monkeypatch, num_steps=NUM_STEPS
    )


@pytest.mark.parametrize("size", [CAMERA, (65, 63), (20, 300), (7, 9)], ids=str)
def test_reduced_bundle_equals_plain_torch(model: Any, reduced: Pipeline, size: tuple[int, int]) -> None:
    picture, prompt = random_picture(*size, seed=3), "w1 w2 w3 w4 w5 w6"
    inputs = hugging_face_inputs(reduced, picture, prompt)
    answer = reduced.generate(picture, prompt, max_new_tokens=1)
    _ = answer.text
    with torch.no_grad():
        (features,) = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    spots = inputs["input_ids"][0] == IMAGE_ID
    embeds[0, spots] = features
    logits, kept = reduced_logits(model, embeds, REDUCED, visual=spots.nonzero()[:, 0].tolist())
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_the_camera_has_no_padding(reduced: Pipeline) -> None:
    prepared = reduced._level.vision.prepare(random_picture(*CAMERA), PROMPTS[0])
    sizes = reduced.images.sizes(*CAMERA)
    assert len(prepared.inputs["token_index"]) == prepared.layout.num_visual == sizes["N"]
    assert len(prepared.inputs["pixel_values"]) == sizes["B"]


def test_the_base_tile_is_drawn_as_an_overview(reduced: Pipeline) -> None:
    answer = reduced.generate(random_picture(*CAMERA), PROMPTS[0], max_new_tokens=1)
    _ = answer.text
    assert reduced.images.layout(*CAMERA).overview == range(TOKENS_PER_TILE)
    assert len(answer.boxes) == reduced.images.sizes(*CAMERA)["N"]
    np.testing.assert_allclose(answer.boxes[TOKENS_PER_TILE, :2], 0, atol=1)


def test_the_prompt_is_the_one_of_hugging_faces_processor(keep_all: Pipeline) -> None:
    picture = random_picture(53, 40)
    ids = keep_all._encode(build_messages(PROMPTS[0], images=[None]))
    theirs = hugging_face_inputs(keep_all, picture, PROMPTS[0])["input_ids"][0]
    count = keep_all.images.sizes(*picture.size)["N"]
    assert [*ids.before, *[IMAGE_ID] * count, *ids.after] == theirs.tolist()


def test_the_template_of_a_checkpoint_comes_before_the_familys(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "ck")
    messages = build_messages("w1", images=[None], system="w2")
    for expected in (
        "<|im_start|>system\n\nw2<|im_end|><|im_start|>user\n<image>\nw1<|im_end|><|im_start|>assistant\n",
        "<|im_start|>system\nw2<|im_end|>\n<|im_start|>user\n<image>\nw1<|im_end|>\n<|im_start|>assistant\n",
    ):
        text = read_text_files(read_checkpoint(str(copy)), default_template=LLAVA_ONEVISION_TEMPLATE)
        assert (text.chat_template == TEMPLATE) == (copy / "chat_template.json").exists()
        assert render_chat(messages, template=text.chat_template) == expected
        (copy / "chat_template.json").unlink(missing_ok=True)


def test_every_graph_is_built_by_tensorrt(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(reduced_bundle(folder))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


def test_tied_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    """With fewer grids, which Hugging Face can be asked for in configuration and processor."""
    folder = save_onevision_checkpoint(tmp_path / "ck", tie=True, num_layers=1, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder, max_visual=125)) as pipeline:
        pinpoints = [list(pinpoint) for pinpoint in pipeline.images.to_dict()["grid_pinpoints"]]
        assert pinpoints == [pair for pair in PINPOINTS if pair[0] * pair[1] <= 2 * TILE_SIZE**2]
        assert (pipeline.manifest.dtype, pipeline.manifest.max_visual) == ("float16", 120)
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        theirs = load(folder)
        theirs.config.image_grid_pinpoints = pinpoints
        _, logits = generate(theirs, hugging_face_inputs(pipeline, picture, PROMPTS[0], pinpoints=pinpoints))
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


def test_fewer_visual_tokens_than_the_smallest_grid_gives_are_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match=r"--max-visual: expected at least 78 .*, got 77; raise it"):
        export(folder, max_visual=77)


@pytest.mark.parametrize("size", ["0.5", "7"])
def test_aliases_name_the_published_checkpoints(size: str) -> None:
    repository = f"llava-hf/llava-onevision-qwen2-{size}b-ov-hf"
    assert ALIASES[f"llava-onevision-{size}b"].repository == repository


@pytest.mark.parametrize("prefix", ["", "model."], ids=["old", "new"])
def test_names_of_old_and_new_releases_are_one(prefix: str) -> None:
    layer = "vision_tower.encoder.layers.0.layer_norm1.bias"
    assert canonical_name(prefix + layer) == layer
    assert canonical_name("vision_tower.vision_model.encoder.layers.0.layer_norm1.bias") == layer
    assert canonical_name(f"{prefix}image_newline") == "image_newline"


def test_encoder_reduction_is_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="--encoder-keep: expected none for llava_onevision, got 32"):
        export(folder, encoder_keep=32)


def test_selections_by_the_class_token_are_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="needs no class token for llava_onevision"):
        export(folder, token_method="visionzip", token_keep=15)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config", {"vision_feature_select_strategy": "default"}, "select_strategy 'full', got 'default'"),
        ("config", {"vision_aspect_ratio": "square"}, "such as 'anyres_max_9', got 'square'"),
        ("config", {"vision_aspect_ratio": "anyres_max_0"}, "such as 'anyres_max_9', got 'anyres_max_0'"),
        (
            "config",
            {"text_config": {"model_type": "qwen3_moe"}},
            "decoder of type llama, mistral, qwen2, got 'qwen3_moe'",
        ),
        (
            "config",
            {"vision_config": {"model_type": "clip_vision_model"}},
            "'siglip_vision_model', got 'clip",
        ),
        (
            "config",
            {"vision_config": {"model_type": "siglip_vision_model", "image_size": [26, 52]}},
            r"one number as vision image_size, got \[26, 52\]",
        ),
        ("config", {"image_grid_pinpoints": [[26, 26]]}, "expected the same image_grid_pinpoints"),
        ("config", {"image_grid_pinpoints": None}, "expected the same image_grid_pinpoints"),
        (
            "processor_config",
            {"vision_aspect_ratio": "anyres_max_9"},
            r"'anyres_max_2' .*, got 'anyres_max_9'",
        ),
        ("processor_config", {"num_image_tokens": 35}, "expected num_image_tokens 36 .*, got 35"),
        ("preprocessor_config", {"size": {"height": 24, "width": 24}}, "multiples of tile_size 24"),
        (
            "preprocessor_config",
            {"image_processor_type": "SiglipImageProcessor"},
            "got 'SiglipImageProcessor",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_files_that_cannot_be_followed_are_refused(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "ck")
    path = copy / f"{file}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        LlavaOnevision().image_processing(read_checkpoint(str(copy)), encoder_keep=None, max_visual=None)
