"""LFM2-VL's tiles: the same grids, numbers and shapes as Hugging Face's processor, and boxes that follow the pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.pictures import noise_picture
from tests.torchvision_reference import PROCESSORS, TorchvisionReference
from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.naflex import NaflexImages

LFM2 = {name: entry for name, entry in PROCESSORS.items() if name.startswith("LFM2")}
SMALL = NaflexImages(tile_size=24, patch_size=4, min_tokens=4, max_tokens=12, max_tiles=7)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name}-{size}") for name in LFM2 for size in LFM2[name].sizes],
)
def test_pixels_and_shapes_equal_the_processor_of_hugging_face(
    name: str, size: tuple[int, int], torchvision_reference: TorchvisionReference
) -> None:
    ours = NaflexImages.from_preprocessor_config(LFM2[name].config)
    theirs = torchvision_reference.theirs(name, size)
    made = ours.prepare(noise_picture(*size))
    np.testing.assert_array_equal(made["pixel_values"], theirs["pixel_values"])
    np.testing.assert_array_equal(made["spatial_shapes"], theirs["spatial_shapes"])
    assert ours.grid(*size) == (int(theirs["image_rows"][0]), int(theirs["image_cols"][0]))
    assert len(made["token_index"]) == ours.sizes(*size)["N"] == theirs["pixel_attention_mask"].sum() // 4
    assert image_processing(ours.to_dict(), encoder_keep=None) == ours


@pytest.mark.parametrize("size", [(60, 45), (24, 24), (9, 7), (130, 31), (31, 130), (100, 99)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_are_where_a_tokens_pixels_come_from(size: tuple[int, int], axis: int) -> None:
    """The mean of a colour ramp in a token's patches tells its place."""
    ramp = np.linspace(0, 255, size[axis])
    levels = np.broadcast_to(ramp[None, :, None] if axis == 0 else ramp[:, None, None], (*size[::-1], 3))
    made = SMALL.prepare(Image.fromarray(levels.astype(np.uint8)))
    means = made["pixel_values"].reshape(-1, made["pixel_values"].shape[-1]).mean(-1)
    places = (means[made["token_index"]].mean(-1) + 1) / 2 * size[axis]
    boxes = SMALL.layout(*size).boxes
    centers = (boxes[:, axis] + boxes[:, axis + 2]) / 2
    np.testing.assert_allclose(places, centers, atol=0.04 * size[axis])


def test_text_names_each_tile_and_the_thumbnail() -> None:
    layout = SMALL.layout(60, 45)
    names = [f"<|img_row_{row}_col_{column}|>" for row in (1, 2) for column in (1, 2, 3)]
    names[0] = "<|image_start|>" + names[0]
    assert layout.text == (*names, "<|img_thumbnail|>", "<|image_end|>")
    assert layout.run_lengths == (9,) * 6 + (12,)
    assert list(layout.overview) == list(range(54, 66))
    assert SMALL.layout(24, 24).text == ("<|image_start|>", "<|image_end|>")


def test_forms_of_levels_have_fewer_tiles() -> None:
    base = SMALL.at_base()
    assert base is not None
    assert base.sizes(60, 45) == {"B": 1, "N": 12}
    assert base.at_base() is None
    for side, tiles in ((23, 1), (47, 3), (48, 5)):
        within = SMALL.within(side, 48)
        assert within is not None
        assert within.sizes(60, 60)["B"] == tiles


def test_an_image_that_is_too_long_is_refused() -> None:
    with pytest.raises(ImageError, match=r"at most 12 visual tokens .* 1x400 pixels with 69; crop it"):
        SMALL.sizes(1, 400)


def test_every_image_fits_the_largest_sizes() -> None:
    largest = SMALL.any_image_sizes()[-1]
    for width in range(8, 100, 7):
        for height in range(8, 100, 9):
            sizes = SMALL.sizes(width, height)
            assert sizes["B"] <= largest["B"]
            assert sizes["N"] <= largest["N"]
