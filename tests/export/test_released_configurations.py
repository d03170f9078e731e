"""Configuration files as they were released, which differ from what transformers writes today."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.minicpm_checkpoints import their_inputs as minicpm_inputs
from tests.mistral3_checkpoints import whole_image
from tests.pictures import random_picture
from tests.qwen_checkpoints import REDUCED, save_qwen_checkpoint
from tests.released_checkpoints import (
    merged,
    released,
    released_aliases,
    write_empty_weights,
    write_files,
    write_random_weights,
)
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import ALIASES
from trio_edge.export.options import ExportOptions
from trio_edge.export.plan import ExportPlan, build, read, resolve, without_values
from trio_edge.profiling.predict.models import MODELS
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import build_messages
from trio_edge.runtime.prompts.tokenizer import Inset
from trio_edge.trio.budgets import ScheduleRequest

if TYPE_CHECKING:
    from pathlib import Path


STAGES = Schedule(stages=(Stage(layer=1, keep=14),))
CAMERA = (40, 40)
PROMPT = "What is this?"
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
_DECODER = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}  # fmt: skip
# A head has 128 numbers as released, which the M-RoPE sections add up to.
_QWEN = {
    "hidden_size": 256, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3,
    "vision_config": {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 256,
        "fullatt_block_indexes": [1, 3],
    },
}  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": {"text_config": _DECODER, "vision_config": _TOWER},
    "llava-next-mistral-7b": {"text_config": _DECODER, "vision_config": _TOWER},
    "llava-onevision-0.5b": {"text_config": _DECODER, "vision_config": _TOWER},
    "qwen2.5-vl-3b": _QWEN,
    "qwen3-vl-2b": {
        "text_config": {key: value for key, value in _QWEN.items() if key != "vision_config"},
        "vision_config": {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 256,
            "deepstack_visual_indexes": [0, 1, 3],
        },
    },
    "qwen3.5-9b": {
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
        },
    },
    "internvl3-1b": {"text_config": _DECODER, "vision_config": _TOWER},
    "internvl3.5-1b": {"text_config": {**_DECODER, "head_dim": 32}, "vision_config": _TOWER},
    "ministral-3-3b": {
        "text_config": {**_DECODER, "head_dim": 32},
        "vision_config": {**_TOWER, "head_dim": 16},
    },
    "lfm2.5-vl-450m": {
        "text_config": {
            **_DECODER,
            "num_heads": 4,
            "layer_types": ["full_attention", "conv", "full_attention"],
        },
        "vision_config": _TOWER,
    },
    "minicpm-v-4.6": {
        "insert_layer_id": 1,
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        "vision_config": _TOWER,
    },
    "smolvlm2-500m": {"text_config": {**_DECODER, "head_dim": 16}, "vision_config": _TOWER},
}
"""Sizes of one model of each family, all else as released: also the vocabulary, image sizes and token ids."""


def plan_of(folder: Path, *, keep: float | None = None) -> ExportPlan:
    """Return the plan of an export, which finds everything that can be wrong with a checkpoint."""

    options = ExportOptions(model=str(folder), out=folder / "bundle", schedule=ScheduleRequest(average=keep))
    source = read(options)
    resolved = resolve(options, source)
    with without_values(resolved.dtype):
        return build(options, source, resolved)


def files_of(alias: str, folder: Path, **changes: dict[str, Any]) -> Path:
    """Write the files of ``alias`` and weights without values; ``changes`` are by file name, without its ending."""
    description = released(alias)
    for name, values in changes.items():
        description["files"][f"{name}.json"] = merged(description["files"].get(f"{name}.json", {}), values)
    write_files(folder, description)
    write_empty_weights(folder)
    return folder


def test_every_alias_is_described() -> None:
    assert sorted(released_aliases()) == sorted(set(ALIASES) - {"tiny"})


@pytest.mark.parametrize("alias", released_aliases())
def test_an_alias_is_planned_at_its_full_size(alias: str, tmp_path: Path) -> None:
    plan = plan_of(files_of(alias, tmp_path))
    expected, text = MODELS[alias], plan.resolved.text
    assert plan.dimensions == expected.decoder
    assert plan.model.vision_dimensions == expected.vision
    assert plan.resolved.processing.sizes(640, 480) == expected.images.sizes(640, 480)
    config = released(alias)["files"]["config.json"]
    assert text.spec.image_token_id == config.get("image_token_index", config.get("image_token_id"))
    assert text.spec.image_token == released(alias)["tokens"][str(text.spec.image_token_id)]
    assert text.spec.stop_token_ids
    assert plan.resolved.dtype == ("float32" if config.get("torch_dtype") == "float32" else "float16")


@pytest.mark.parametrize("alias", [*SMALL, "smolvlm2-2.2b"])
def test_a_family_is_planned_with_few_of_its_tokens(alias: str, tmp_path: Path) -> None:
    # the first layers, which see all tokens, have no attention: two of 16 in LFM2.5, three of 24 in MiniCPM-V
    plan = plan_of(files_of(alias, tmp_path), keep=0.2 if alias.startswith(("lfm", "minicpm")) else 0.111)
    assert plan.layout.schedule.stages


@pytest.mark.parametrize("alias", SMALL)
def test_a_small_model_with_released_files_answers_as_in_transformers(alias: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    description = released(alias)
    description["files"]["config.json"] = merged(description["files"]["config.json"], SMALL[alias])
    folder = write_files(tmp_path, description)
    write_random_weights(folder)
    qwen = alias.startswith("qwen")
    bundle = export(
        folder, schedule=Schedule(positions="preserved" if qwen else "compact"), dtype="float32", max_text=128,
        image_sizes=(CAMERA,), only_image_sizes=True,
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with Pipeline.from_bundle(bundle) as pipeline, torch.no_grad():
        answer = pipeline.generate(random_picture(*CAMERA), PROMPT, max_new_tokens=2)
        assert answer.text is not None
        theirs = model(**hugging_face_inputs(pipeline, model.config.model_type)).logits[0, -1]
        np.testing.assert_allclose(answer.first_logits, theirs.numpy(), **LOGITS_FLOAT32)


def hugging_face_inputs(pipeline: Pipeline, model_type: str) -> dict[str, torch.Tensor]:
    """Return the model's inputs with the runtime's ids and pixels, which have tests of their own."""
    picture, image_id = random_picture(*CAMERA), pipeline.manifest.text.image_token_id
    processing: Any = pipeline.images  # type: ignore[attr-defined]
    layout, messages = processing.layout(*picture.size), build_messages(PROMPT, images=[picture])
    if model_type == "minicpmv4_6":
        return minicpm_inputs(pipeline, messages)
    ids = pipeline._encode(messages, [Inset(layout.text)])
    prepared, count = processing.prepare(picture), layout.num_visual
    input_ids = ids.all_ids(layout.run_lengths).astype(np.int64)[None]
    pixels, inputs = torch.from_numpy(prepared["pixel_values"]), {"input_ids": torch.from_numpy(input_ids)}
    if model_type in ("llava_next", "llava_onevision"):
        return {**inputs, "pixel_values": pixels[None], "image_sizes": torch.tensor([picture.size[::-1]])}
    if model_type == "mistral3":
        whole = whole_image(processing, picture)
        return {**inputs, "pixel_values": whole, "image_sizes": torch.tensor([whole.shape[2:]])}
    if model_type == "lfm2_vl":
        shapes = torch.from_numpy(prepared["spatial_shapes"])
        mask = (torch.arange(pixels.shape[1])[None] < shapes.prod(-1, keepdim=True)).to(torch.int32)
        shape = {"spatial_shapes": shapes.to(torch.int64), "pixel_attention_mask": mask}
        return {**inputs, "pixel_values": pixels, **shape}
    if model_type == "smolvlm":
        return {**inputs, "pixel_values": pixels[None]}
    if not model_type.startswith("qwen"):
        return {**inputs, "pixel_values": pixels}
    by_token = prepared["pixel_values"].reshape(count, 4, -1)[prepared["token_index"]]
    rows, columns = (2 * side for side in processing.token_grid(*picture.size))
    return {
        **inputs,
        "pixel_values": torch.from_numpy(by_token.reshape(count * 4, -1)),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "mm_token_type_ids": torch.from_numpy((input_ids == image_id).astype(np.int32)),
    }


# Forms of the same files that transformers has written over time.


def _as_4_55(config: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-VL saved by 4.49 to 4.57: the decoder's keys both at the top and below, RoPE types renamed."""
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    text = {key: value for key, value in config.items() if key not in ("vision_config", "architectures")}
    text = {**text, "model_type": "qwen2_5_vl_text", "rope_scaling": rope, "image_token_id": None}
    layers = ["full_attention"] * config["num_hidden_layers"]
    text |= {"layer_types": layers, "sliding_window": None, "video_token_id": None}
    return {**config, "rope_scaling": rope, "text_config": text}


def test_a_qwen_saved_again_by_transformers_4_is_planned_alike(tmp_path: Path) -> None:
    first = files_of("qwen2.5-vl-3b", tmp_path / "first")
    again = files_of("qwen2.5-vl-3b", tmp_path / "again")
    config = _as_4_55(json.loads((again / "config.json").read_text()))
    # A flat key that differs shows which place counts: transformers reads the one below.
    (again / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "rope_theta": 1.0}))
    ours, theirs = plan_of(again), plan_of(first)
    assert ours.dimensions == theirs.dimensions
    assert (ours.model.inv_freq != 0).sum(axis=1).tolist() == [16, 24, 24]
    np.testing.assert_array_equal(ours.model.inv_freq, theirs.model.inv_freq)


@pytest.mark.parametrize(
    "processor",
    [
        {"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"size": 336, "crop_size": 336},
        {
            "image_processor_type": "CLIPImageProcessorFast",
            "_valid_processor_keys": ["images"],
            "device": None,
        },
    ],
    ids=["feature extractor", "sides as numbers", "fast"],
)
def test_older_image_processor_files_say_the_same(processor: dict[str, Any], tmp_path: Path) -> None:
    folder = files_of("llava-1.5-7b", tmp_path)
    expected = plan_of(folder).resolved.processing
    values = json.loads((folder / "preprocessor_config.json").read_text()) | processor
    values = {key: value for key, value in values.items() if key != "image_processor_type" or value}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert plan_of(folder).resolved.processing == expected


@pytest.mark.parametrize(
    ("key", "value"), [("use_square_size", True), ("pad_size", {"height": 400, "width": 400})]
)
def test_a_step_of_the_image_processor_that_is_not_followed_is_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    folder = files_of("llava-1.5-7b", tmp_path, preprocessor_config={key: value})
    with pytest.raises(
        CheckpointError, match=f"preprocessor_config {key}: expected none, got .*; this image"
    ):
        plan_of(folder)


def test_the_processor_file_of_transformers_5_counts_more_than_an_older_one(tmp_path: Path) -> None:
    """Saving a processor again leaves the older file where it lies; transformers reads the newer."""
    folder = files_of("llava-1.5-7b", tmp_path)
    older = json.loads((folder / "preprocessor_config.json").read_text())
    newer = {"image_processor": {**older, "image_mean": [0.5, 0.5, 0.5]}, "patch_size": 14}
    (folder / "processor_config.json").write_text(json.dumps(newer))
    assert msgspec.to_builtins(plan_of(folder).resolved.processing)["image_mean"] == (0.5,) * 3
    (folder / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert msgspec.to_builtins(plan_of(folder).resolved.processing)["image_mean"] == tuple(
        older["image_mean"]
    )


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
@pytest.mark.parametrize("named", [False, True], ids=["one template", "several"])
def test_a_chat_template_is_found_wherever_transformers_kept_it(
    file: str, named: bool, tmp_path: Path
) -> None:
    folder = files_of("llava-1.5-7b", tmp_path)
    template = "{{ '<image>' }}{{ messages[0]['content'][1]['text'] }}"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    (folder / "chat_template.json").unlink()
    values = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps({**values, "chat_template": several if named else template}))
    assert plan_of(folder).resolved.text.chat_template == template


def test_a_chat_template_in_another_form_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = files_of("llava-1.5-7b", tmp_path)
    only_tools = [{"name": "tool_use", "template": "no"}]
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": only_tools}))
    with pytest.raises(CheckpointError, match=r"chat_template.json chat_template: expected .*'default'.*; "):
        plan_of(folder)


def test_a_template_may_name_any_special_token_of_the_tokenizer(tmp_path: Path) -> None:
    """transformers hands templates all of them; a bundle's manifest has the first two."""
    description = released("llava-1.5-7b")
    description["files"]["tokenizer_config.json"]["extra_special_tokens"] = {"image_token": "<image>"}
    folder = write_files(tmp_path, description)
    write_empty_weights(folder)
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": "{% for m in messages %}{{ image_token + eos_token }}{% endfor %}"})
    )
    from trio_edge.runtime.prompts.chat import render_chat

    text = plan_of(folder).resolved.text
    tokens = {"bos_token": text.spec.bos_token, "eos_token": text.spec.eos_token}
    messages = build_messages("w", images=[None])
    assert render_chat(messages, template=text.chat_template, special_tokens=tokens) == "<image></s>"


# Element types


def _qwen(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """Qwen2.5-VL: the decoder's keys stand at the top, and the element type with them."""
    save_qwen_checkpoint(folder, dtype=torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    return REDUCED, {**config.pop("text_config"), **config, "torch_dtype": "bfloat16"}


def _llava(folder: Path) -> tuple[Schedule, dict[str, Any]]:
    """LLaVA: the decoder has an element type of its own, that of the language model it was made from."""
    save_checkpoint(folder, num_layers=2, num_kv_heads=2)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["torch_dtype"] = "bfloat16"
    config["vision_config"]["torch_dtype"] = "float16"
    return STAGES, {**config, "torch_dtype": "float16"}


@pytest.mark.parametrize("make", [_qwen, _llava])
def test_element_types_in_the_configuration_change_nothing(make: Any, tmp_path: Path) -> None:
    schedule, released = make(tmp_path / "today")
    shutil.copytree(tmp_path / "today", tmp_path / "released")
    (tmp_path / "released" / "config.json").write_text(json.dumps(released))
    today, then = (
        open_bundle(export(tmp_path / name, tmp_path / f"{name}-bundle", schedule=schedule)).manifest
        for name in ("today", "released")
    )
    assert [(file.path, file.sha256) for file in then.files] == [
        (file.path, file.sha256) for file in today.files
    ]
