"""Cosmos3's reasoner: a Qwen3-VL in files that also hold a generator, with other names and in folders.

The bundle is that of Qwen3-VL, whose tests prove everything else.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bundles import export
from tests.pictures import random_picture
from tests.qwen_checkpoints import CAMERA, KEEP_ALL, REDUCED, hugging_face_inputs, save_qwen3_vl_checkpoint
from tests.spec.whole_answers import assert_same_answer
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

OTHER_NAMES = {
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "self_attn.o_proj": "self_attn.to_out",
    "self_attn.q_norm": "self_attn.norm_q",
    "self_attn.k_norm": "self_attn.norm_k",
    "model.language_model.": "",
    "model.visual.": "",
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_vl_checkpoint(tmp_path_factory.mktemp("qwen") / "ck")


@pytest.fixture(scope="module")
def cosmos(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, as NVIDIA's files have them: the decoder in one folder, the tower in another."""
    folder = tmp_path_factory.mktemp("cosmos")
    for path in qwen.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "cosmos3_omni", "architectures": ["Cosmos3ForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "qwen3_vl"
    (folder / "config.json").write_text(json.dumps(config))
    parts: dict[str, dict[str, object]] = {
        "transformer/0.safetensors": {},
        "vision_encoder/0.safetensors": {},
    }
    for name, tensor in load_file(qwen / "model.safetensors").items():
        file = "vision_encoder/0.safetensors" if ".visual." in name else "transformer/0.safetensors"
        for old, new in OTHER_NAMES.items():
            name = name.replace(old, new)
        parts[file][name] = tensor
        if "to_q" in name:  # the generator's own projection
            parts[file][name.replace("to_q", "add_q_proj")] = tensor * 2
    for file, tensors in parts.items():
        (folder / file).parent.mkdir()
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, found in parts.items() for name in found}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("schedule", [KEEP_ALL, REDUCED], ids=["keep-all", "reduced"])
def test_the_bundle_is_that_of_qwen3_vl_with_the_same_weights(
    schedule: object, qwen: Path, cosmos: Path
) -> None:
    own, other = (export(folder, schedule=schedule, dtype="float16") for folder in (cosmos, qwen))
    manifests = []
    for bundle in (own, other):
        manifest = json.loads((bundle / "trio.json").read_text())
        manifests.append({key: value for key, value in manifest.items() if key not in ("family", "model")})
    assert open_bundle(own).manifest.family == "cosmos3_omni"
    assert manifests[0] == manifests[1]  # which has the hashes of all files


@pytest.mark.parametrize("size", [None, CAMERA, (90, 33)], ids=str)
def test_keep_all_answers_as_hugging_face_reads_these_files(
    size: tuple[int, int] | None, cosmos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Cosmos3OmniForConditionalGeneration

    model = Cosmos3OmniForConditionalGeneration.from_pretrained(cosmos, dtype=torch.float32).eval()
    picture = None if size is None else random_picture(*size)
    with Pipeline.from_bundle(export(cosmos, schedule=KEEP_ALL, image_sizes=(CAMERA,))) as pipeline:
        inputs = hugging_face_inputs(pipeline, picture, "w5 w4 w3")
        assert_same_answer(
            model, pipeline, inputs, picture=picture, prompt="w5 w4 w3", monkeypatch=monkeypatch
        )
