"""Qwen3-VL's vision module against Hugging Face, in torch, for every variant of its configuration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from tests.pictures import random_picture
from trio_edge.export.graphs.vision import deepstack
from trio_edge.export.graphs.vision.deepstack import DeepstackVision, deepstack_groups, vision_inputs
from trio_edge.runtime.images.qwen import Qwen3Images

OUT = 24
SIZES = {"one_token": (16, 16), "wide": (150, 40), "one_row": (270, 9), "one_column": (9, 300)}
VARIANTS: dict[str, dict[str, Any]] = {
    "as_released": {},
    "two_planes": {"deepstack_visual_indexes": [1, 2]},
    "no_plane": {"deepstack_visual_indexes": []},
    "indexes_in_any_order": {"deepstack_visual_indexes": [3, 0, 2]},
    "the_same_index_twice": {"deepstack_visual_indexes": [1, 1, 2]},
    "indexes_that_are_no_layer": {"deepstack_visual_indexes": [0, 9, -1]},
    "merge_3": {"spatial_merge_size": 3},
    "a_small_table": {"num_position_embeddings": 1},
    "a_table_that_is_no_square": {"num_position_embeddings": 30},
    "relu": {"hidden_act": "relu"},
}
TOLERANCES = {"float32": {"rtol": 1e-5, "atol": 1e-5}, "float16": {"rtol": 0.0, "atol": 2e-2}}


def random_tower(**changes: Any) -> Qwen3VLVisionModel:
    """Return a tower whose numbers stay about 1; nothing is 0 or 1."""
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": OUT,
        "depth": 4,
        "patch_size": 8,
    }
    config = Qwen3VLVisionConfig(
        **{**sizes, "deepstack_visual_indexes": [0, 1, 3], "num_position_embeddings": 25, **changes}
    )  # fmt: skip
    config._attn_implementation = "eager"
    tower = Qwen3VLVisionModel(config).eval()
    for name, parameter in tower.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 and "pos_embed" not in name else 100
        torch.nn.init.normal_(parameter, std=1 / fan_in**0.5)
        if "norm" in name:
            parameter.data += 1
    return tower.requires_grad_(False)


def processing(tower: Qwen3VLVisionModel) -> Qwen3Images:
    return Qwen3Images(
        patch_size=8,
        merge_size=tower.config.spatial_merge_size,
        min_pixels=16 * 16,
        max_pixels=60 * 16 * 16,
        table_size=tower.num_grid_per_side,
    )


def ours(tower: Qwen3VLVisionModel, inputs: dict[str, Any], *, num_planes: int = 3) -> list[np.ndarray]:
    inv_freq, _ = type(tower.rotary_pos_emb).compute_axial_rope_parameters(tower.config)
    module = DeepstackVision(tower, inv_freq=inv_freq, max_patches=10_000, num_planes=num_planes)
    names = [tensor.name for tensor in vision_inputs(module.embedding.patch_values)]
    return [rows.numpy() for rows in module(*(torch.from_numpy(inputs[name]) for name in names))]


def hugging_face(tower: Qwen3VLVisionModel, images: Qwen3Images, size: tuple[int, int]) -> list[np.ndarray]:
    inputs = images.prepare(random_picture(*size))
    grid = [1, *(images.merge_size * count for count in images.token_grid(*size))]
    output = tower(torch.from_numpy(inputs["pixel_values"]), torch.tensor([grid]))
    return [rows.numpy() for rows in (output.pooler_output, *output.deepstack_features)]


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_and_planes_equal_hugging_face(variant: str, size: tuple[int, int], padded: bool) -> None:
    tower = random_tower(**VARIANTS[variant])
    images = processing(tower)
    inputs = images.prepare(random_picture(*size), images.any_image_sizes()[-1] if padded else None)
    inputs["pixel_values"][inputs["num_patches"][0] :] = 100.0  # padding reaches nothing
    got, expected = ours(tower, inputs), hugging_face(tower, images, size)
    assert len(got) == len(expected)
    for rows, theirs in zip(got, expected):
        np.testing.assert_allclose(rows[: len(theirs)], theirs, **TOLERANCES["float32"])


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_attention_in_blocks_of_heads_equals_hugging_face(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepstack, "num_head_blocks", lambda num_heads, _num_patches: num_heads)
    tower = random_tower()
    images = processing(tower)
    got = ours(tower, images.prepare(random_picture(*size)))
    for rows, theirs in zip(got, hugging_face(tower, images, size)):
        np.testing.assert_allclose(rows, theirs, **TOLERANCES["float32"])


def test_float16_holds_activations_beyond_its_range() -> None:
    tower = random_tower()
    images, size = processing(tower), SIZES["wide"]
    tower.blocks[-1].mlp.linear_fc1.weight.data *= 600
    tower.blocks[-1].mlp.linear_fc2.weight.data *= 600
    expected = hugging_face(tower, images, size)
    half = tower.half()
    assert not np.isfinite(hugging_face(half, images, size)[0]).all()
    for rows, theirs in zip(ours(half, images.prepare(random_picture(*size))), expected):
        np.testing.assert_allclose(rows, theirs, **TOLERANCES["float16"])


def test_planes_behind_the_decoders_last_layer_are_left_out() -> None:
    tower = random_tower()
    inputs = processing(tower).prepare(random_picture(*SIZES["wide"]))
    few, all_planes = ours(tower, inputs, num_planes=1), ours(tower, inputs)
    assert len(few) == 2
    assert all(map(np.array_equal, few, all_planes))


@pytest.mark.parametrize("num_planes", [1, 3])
def test_every_linear_layer_that_runs_is_in_a_group(num_planes: int) -> None:
    tower = random_tower()
    groups = deepstack_groups(tower, num_planes=num_planes)
    grouped = {id(linear) for group in groups for linear in group.linears}
    unused = {
        id(layer) for merger in list(tower.deepstack_merger_list)[num_planes:] for layer in merger.modules()
    }
    linears = {id(layer) for layer in tower.modules() if isinstance(layer, torch.nn.Linear)}
    assert grouped == linears - unused
    assert len({(group.layer, group.name) for group in groups}) == len(groups)
