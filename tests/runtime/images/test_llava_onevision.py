"""LLaVA-OneVision's limit on large grids: the same counts and sums as Hugging Face; tiles and pixels are in ``test_llava.py``."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from tests.pictures import noise_picture
from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.llava import ONEVISION_PINPOINTS, LlavaImages

RELEASED = LlavaImages(
    kind="anyres",
    tile_size=384,
    patch_size=14,
    resize_size=384,
    grid_pinpoints=ONEVISION_PINPOINTS,
    max_grid_tiles=9,
)
SMALL = LlavaImages(
    kind="anyres",
    tile_size=30,
    patch_size=4,
    resize_size=30,
    grid_pinpoints=((30, 30), (30, 60), (60, 30), (60, 60), (90, 60), (90, 120)),
    max_grid_tiles=2,
)
ALL = {"released": RELEASED, "small": SMALL}
ROUNDED_TWICE = 2.5e-4
"""torch places a sample among up to 162 patches; without fused multiply-add it rounds once more, by up to 1.5e-5. Of features that
are 8 apart that is 1.2e-4, in rows and in columns."""


def pinpoints(images: LlavaImages) -> list[list[int]]:
    return [list(pinpoint) for pinpoint in images.grid_pinpoints]


def hugging_face_tokens(
    width: int, height: int, images: LlavaImages, rows: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Return the visual tokens that pack_image_features makes of the graph's rows, and the processor's count."""
    vision = SimpleNamespace(image_size=images.tile_size, patch_size=images.patch_size)
    model = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints(images))
    )
    ratio = f"anyres_max_{images.max_grid_tiles}"
    packed, _ = LlavaOnevisionModel.pack_image_features(
        model,
        [rows[:-1].view(-1, images.patches_per_tile, rows.shape[-1])],
        [(height, width)],
        image_newline=rows[-1],
        vision_aspect_ratio=ratio,
    )
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints(images)),
        num_image_tokens=images.patches_per_tile,
        vision_aspect_ratio=ratio,
    )
    processor._get_unpadded_features = partial(LlavaOnevisionProcessor._get_unpadded_features, processor)
    side = images.tile_size
    count = LlavaOnevisionProcessor._get_number_of_features(processor, height, width, side, side)
    return packed[0], count


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(ALL)), st.integers(1, 3000), st.integers(1, 3000))
@example("released", 2304, 2304)
@example("released", 1152, 1380)
@example("released", 1, 3000)
@example("released", 3000, 2)
@example("small", 60, 60)
def test_counts_and_weighted_sums_equal_hugging_face(name: str, width: int, height: int) -> None:
    images = ALL[name]
    num_rows = images.sizes(width, height)["B"] * images.patches_per_tile + 1
    rows = torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(width))
    expected, count = hugging_face_tokens(width, height, images, rows)
    index, weights = images.weighted_index(width, height)
    assert (index.dtype, weights.dtype) == (np.int32, np.float32)
    assert len(index) == len(weights) == images.sizes(width, height)["N"] == count
    ours = (rows.numpy()[index] * weights[:, :, None]).sum(axis=1)
    np.testing.assert_allclose(ours, expected.numpy(), atol=ROUNDED_TWICE)


def test_a_grid_within_the_limit_is_a_plain_gather() -> None:
    index, weights = SMALL.weighted_index(60, 30)
    np.testing.assert_array_equal(weights, np.tile([1, 0, 0, 0], (len(index), 1)))
    unlimited = LlavaImages.from_dict({**SMALL.to_dict(), "max_grid_tiles": None})
    np.testing.assert_array_equal(index[:, 0], unlimited.token_index(60, 30))


def test_the_released_models_have_at_most_8765_visual_tokens_in_37_tiles() -> None:
    assert [sizes["B"] for sizes in RELEASED.any_image_sizes()] == [2, 3, 5, 10, 19, 37]
    assert {sizes["N"] for sizes in RELEASED.any_image_sizes()} == {8765}
    assert RELEASED.sizes(1152, 1380) == {"B": 13, "N": 8765}
    assert RELEASED.sizes(2304, 2304) == {"B": 37, "N": 729 + 81 * 82}


def test_every_picture_has_room_in_the_sizes_for_any_picture_and_one_needs_it_all() -> None:
    shapes = SMALL.any_image_sizes()
    own = [SMALL.sizes(width, height) for width in range(1, 130) for height in range(1, 130)]
    assert max(sizes["N"] for sizes in own) == shapes[-1]["N"]
    assert max(sizes["B"] for sizes in own) == shapes[-1]["B"]


def test_padding_adds_tiles_of_zeros_and_rows_without_weight() -> None:
    own = SMALL.sizes(100, 80)
    exact = SMALL.prepare(noise_picture(100, 80))
    padded = SMALL.prepare(noise_picture(100, 80), {"B": own["B"] + 2, "N": own["N"] + 3})
    newline, patches = own["B"] * SMALL.patches_per_tile, SMALL.patches_per_tile
    moved = np.where(exact["token_index"] == newline, newline + 2 * patches, exact["token_index"])
    np.testing.assert_array_equal(padded["token_index"], np.concatenate([moved, np.zeros((3, 4))]))
    np.testing.assert_array_equal(
        padded["token_weights"], np.concatenate([exact["token_weights"], np.zeros((3, 4))])
    )
    assert not padded["pixel_values"][own["B"] :].any()
    assert {name: str(array.dtype) for name, array in padded.items()} == {
        "pixel_values": "float32",
        "token_index": "int32",
        "token_weights": "float32",
    }


@pytest.mark.parametrize("size", [(290, 200), (200, 310), (58, 29)], ids=str)
def test_a_box_shows_what_its_token_sees(size: tuple[int, int]) -> None:
    """A horizontal and a vertical ramp: a token's mean colour tells where in the picture it looks."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    inputs = SMALL.prepare(Image.fromarray((255 * np.stack([x, y, x], axis=-1)).round().astype(np.uint8)))
    n, p = SMALL.patches_per_side, SMALL.patch_size
    mean, std = (np.array(values)[:, None, None] for values in (SMALL.image_mean, SMALL.image_std))
    levels = (inputs["pixel_values"] * std + mean)[:, :, : n * p, : n * p]
    patches = levels.reshape(-1, 3, n, p, n, p).mean(axis=(3, 5)).transpose(0, 2, 3, 1).reshape(-1, 3)
    rows = np.concatenate([patches, np.full((1, 3), np.nan)])
    with np.errstate(invalid="ignore"):
        seen = (rows[inputs["token_index"]] * inputs["token_weights"][:, :, None]).sum(axis=1)[:, :2]
    boxes = SMALL.layout(*size).boxes
    assert (np.isnan(boxes[:, 0]) == np.isnan(seen[:, 0])).all()
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
    inside = (boxes[:, :2] > 2).all(axis=1) & (boxes[:, 2:] < np.array(size) - 2).all(axis=1)
    assert inside.sum() > 0.3 * len(boxes)
    np.testing.assert_allclose(seen[inside], middle[inside], atol=0.015)


@pytest.mark.parametrize("size", [(290, 100), (120, 310), (60, 60)], ids=str)
def test_a_box_of_one_of_several_shows_what_its_token_sees_and_padding_has_none(
    size: tuple[int, int],
) -> None:
    several = SMALL.of_several()
    layout = several.layout(*size)
    n, p = SMALL.patches_per_side, SMALL.patch_size
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    inputs = several.prepare(Image.fromarray((255 * np.stack([x, y, x], axis=-1)).round().astype(np.uint8)))
    mean, std = (np.array(values)[:, None, None] for values in (SMALL.image_mean, SMALL.image_std))
    levels = (inputs["pixel_values"] * std + mean)[0, :, : n * p, : n * p]
    seen = levels.reshape(3, n, p, n, p).mean(axis=(2, 4)).transpose(1, 2, 0).reshape(-1, 3)[:, :2]
    assert (len(layout.boxes), layout.overview) == (n * n + 1, range(0))
    assert np.isnan(layout.boxes[-1]).all()
    boxes = layout.boxes[:-1]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size
    inside = (boxes[:, :2] > 2).all(axis=1) & (boxes[:, 2:] < np.array(size) - 2).all(axis=1)
    np.testing.assert_allclose(seen[inside], middle[inside], atol=0.015)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    padding = np.abs(levels.reshape(3, n, p, n, p).transpose(1, 3, 0, 2, 4).reshape(n * n, 3, -1)
                     - np.floor(255 * np.array(SMALL.image_mean))[:, None] / 255).max(axis=(1, 2)) < 0.003  # fmt: skip
    assert (areas[padding] == 0).all()
    assert padding.any() == (size[0] != size[1])


def test_boxes_of_a_smaller_grid_share_the_picture_without_gaps() -> None:
    images = LlavaImages.from_dict({**SMALL.to_dict(), "patch_size": 5})  # patches fill a tile
    boxes = images.layout(90, 90).boxes[images.patches_per_tile :]
    real = boxes[~np.isnan(boxes[:, 0])]
    areas = (real[:, 2:] - real[:, :2]).prod(axis=1)
    assert areas.sum() == pytest.approx(90 * 90, rel=1e-5)


def test_constants_survive_json() -> None:
    values = json.loads(json.dumps(SMALL.to_dict()))
    assert image_processing(values, encoder_keep=None) == SMALL


@pytest.mark.parametrize(
    "change",
    [{"kind": "single", "grid_pinpoints": []}, {"encoder_keep": 32}],
    ids=lambda change: next(iter(change)),
)
def test_a_limit_that_cannot_be_followed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match="max_grid_tiles: expected none for kind 'single' or with"):
        LlavaImages.from_dict({**SMALL.to_dict(), **change}, encoder_keep=change.get("encoder_keep"))
