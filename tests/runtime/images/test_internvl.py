"""Tiles of InternVL's pictures: the same grids, counts and numbers as Hugging Face."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorPil,
    get_optimal_tiled_canvas,
)

from tests.pictures import noise_picture, random_picture
from tests.torchvision_reference import PROCESSORS, TorchvisionReference, load_processor
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.tiles import InternVlImages

if TYPE_CHECKING:
    from numpy.typing import NDArray

INTERNVL = {name: entry for name, entry in PROCESSORS.items() if name.startswith("InternVL3")}
DEFAULT = InternVlImages(tile_size=448, tokens_per_side=16)
SMALL = InternVlImages(tile_size=24, tokens_per_side=3, max_tiles=6)
AT_LEAST_3 = InternVlImages(tile_size=30, tokens_per_side=5, min_tiles=3, max_tiles=7)
ONE_TILE = InternVlImages(tile_size=28, tokens_per_side=2, max_tiles=1)
ALL = {"default": DEFAULT, "small": SMALL, "at_least_3": AT_LEAST_3, "one_tile": ONE_TILE}
SIZES = [(1, 1), (24, 24), (48, 48), (49, 47), (100, 20), (20, 100), (1, 300), (71, 50)]


def levels(pixel_values: NDArray[np.float32], processing: InternVlImages) -> NDArray[np.float32]:
    mean, std = (np.array(values)[:, None, None] for values in (processing.image_mean, processing.image_std))
    result: NDArray[np.float32] = (pixel_values * std + mean) / processing.rescale_factor
    return result


@settings(max_examples=300)
@given(st.sampled_from(list(ALL)), st.integers(1, 5000), st.integers(1, 5000))
@example("default", 896, 896)
@example("default", 634, 634)
@example("small", 34, 34)
@example("small", 1, 5000)
def test_grids_and_counts_equal_hugging_face(name: str, width: int, height: int) -> None:
    ours = ALL[name]
    side, limits = ours.tile_size, (ours.min_tiles, ours.max_tiles)
    columns, rows = get_optimal_tiled_canvas((height, width), (side, side), *limits)
    assert ours.grid(width, height) == (rows, columns)
    theirs = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, min_patches=limits[0], max_patches=limits[1]
    )
    tiles = theirs.get_number_of_image_patches(height, width, {"crop_to_patches": True})
    assert ours.sizes(width, height) == {"B": tiles, "N": tiles * ours.tokens_per_tile}


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name}-{size}") for name in INTERNVL for size in INTERNVL[name].sizes],
)
def test_pixels_equal_the_processor_that_hugging_face_uses_by_default(
    name: str, size: tuple[int, int], torchvision_reference: TorchvisionReference
) -> None:
    ours = InternVlImages.from_preprocessor_config(INTERNVL[name].config, tokens_per_side=4)
    pixels = ours.prepare(noise_picture(*size))["pixel_values"]
    theirs = torchvision_reference.theirs(name, size)
    assert len(pixels) == theirs["num_patches"][0]
    np.testing.assert_allclose(levels(pixels, ours), levels(theirs["pixel_values"], ours), atol=0.01)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_come_in_the_order_of_hugging_faces_pillow_processor(size: tuple[int, int]) -> None:
    """Pillow's resizing differs by a few levels; see ``image_resize``."""
    theirs = GotOcr2ImageProcessorPil(
        size={"height": 24, "width": 24}, max_patches=6, crop_to_patches=True, resample=2
    )
    ours = InternVlImages(tile_size=24, tokens_per_side=3, max_tiles=6, resample="bilinear")
    picture = random_picture(*size)
    expected = theirs(picture, return_tensors="np")["pixel_values"]
    pixels = ours.prepare(picture)["pixel_values"]
    np.testing.assert_allclose(levels(pixels, ours), levels(expected, ours), atol=1.01)


def test_internvl3_has_at_most_3328_visual_tokens_in_13_tiles() -> None:
    assert [sizes["B"] for sizes in DEFAULT.any_image_sizes()] == [1, 4, 7, 13]
    assert {sizes["N"] for sizes in DEFAULT.any_image_sizes()} == {3328}


@pytest.mark.parametrize("name", ALL)
def test_every_picture_has_room_in_the_sizes_for_any_picture(name: str) -> None:
    shapes = ALL[name].any_image_sizes()
    own = [ALL[name].sizes(width, height) for width in range(1, 250, 7) for height in range(1, 250, 7)]
    assert all(sizes["B"] <= shapes[-1]["B"] and sizes["N"] <= shapes[-1]["N"] for sizes in own)
    assert max(sizes["N"] for sizes in own) == shapes[-1]["N"] or name == "default"
    assert [sizes["B"] for sizes in shapes] == sorted({sizes["B"] for sizes in shapes})


def test_padding_adds_tiles_of_zeros_and_repeats_the_first_row() -> None:
    exact = SMALL.prepare(noise_picture(100, 20))
    own = SMALL.sizes(100, 20)
    padded = SMALL.prepare(noise_picture(100, 20), {"B": own["B"] + 2, "N": own["N"] + 5})
    np.testing.assert_array_equal(padded["pixel_values"][: own["B"]], exact["pixel_values"])
    assert not padded["pixel_values"][own["B"] :].any()
    np.testing.assert_array_equal(padded["token_index"], [*range(own["N"]), 0, 0, 0, 0, 0])


def test_inputs_have_the_graphs_types() -> None:
    inputs = SMALL.prepare(noise_picture(100, 20))
    assert {name: str(array.dtype) for name, array in inputs.items()} == {
        "pixel_values": "float32",
        "token_index": "int32",
    }


@pytest.mark.parametrize("size", [(300, 200), (120, 400), (40, 40)], ids=str)
def test_a_box_shows_what_its_token_sees(size: tuple[int, int]) -> None:
    """A horizontal and a vertical ramp: a token's mean colour tells where in the picture it looks."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    picture = Image.fromarray((255 * np.stack([x, y, x], axis=-1)).round().astype(np.uint8))
    boxes = SMALL.layout(*size).boxes
    per_side, side = SMALL.tokens_per_side, SMALL.tile_size // SMALL.tokens_per_side
    pixels = levels(SMALL.prepare(picture)["pixel_values"], SMALL)
    seen = pixels.reshape(-1, 3, per_side, side, per_side, side).mean(axis=(3, 5))
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 255
    np.testing.assert_allclose(seen.transpose(0, 2, 3, 1).reshape(-1, 3)[:, :2], middle, atol=3)
    assert boxes.shape == (SMALL.sizes(*size)["N"], 4)
    assert boxes.dtype == np.float32


def test_the_thumbnails_tokens_come_last_and_cover_the_picture() -> None:
    layout = SMALL.layout(300, 200)
    tokens = layout.overview
    boxes = layout.boxes[tokens.start : tokens.stop]
    assert (len(boxes), tokens.stop) == (SMALL.tokens_per_tile, SMALL.sizes(300, 200)["N"])
    assert [*boxes[0, :2], *boxes[-1, 2:]] == [0, 0, 300, 200]


def test_a_single_tile_has_no_thumbnail() -> None:
    assert (SMALL.sizes(20, 20)["B"], len(SMALL.layout(20, 20).overview)) == (1, 0)


def test_constants_survive_json() -> None:
    values = json.loads(json.dumps(AT_LEAST_3.to_dict()))
    assert values["kind"] == "grid_tiles"
    assert InternVlImages.from_dict(values) == AT_LEAST_3


def test_a_manifests_constants_give_the_grid_of_tiles() -> None:
    pictures = image_processing(SMALL.to_dict(), encoder_keep=None)
    assert isinstance(pictures, InternVlImages)
    assert pictures == SMALL


def test_a_manifest_with_encoder_reduction_is_refused() -> None:
    with pytest.raises(ManifestError, match="encoder_keep: expected none with kind 'grid_tiles', got 32"):
        image_processing(SMALL.to_dict(), encoder_keep=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "patches"}, r"Invalid value 'patches' - at `\$.kind`"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"tile_size": 0}, r"Expected `int` >= 1 - at `\$.tile_size`"),
        ({"max_tiles": 2.0}, r"Expected `int`, got `float` - at `\$.max_tiles`"),
        ({"min_tiles": 7}, "min_tiles: expected <= max_tiles 6, got 7"),
        ({"tokens_per_side": 25}, "tokens_per_side: expected <= tile_size 24, got 25"),
        ({"resample": "nearest"}, r"Invalid enum value 'nearest' - at `\$.resample`"),
        ({"image_std": [0, 1, 1]}, r"Expected `float` > 0.0 - at `\$.image_std\[0\]`"),
        ({"image_mean": 3}, r"Expected `array`, got `int` - at `\$.image_mean`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_break_a_rule_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        InternVlImages.from_dict({**SMALL.to_dict(), **change})


def test_a_missing_key_is_refused() -> None:
    values = SMALL.to_dict()
    del values["tokens_per_side"]
    with pytest.raises(ManifestError, match="tokens_per_side"):
        InternVlImages.from_dict(values)


@pytest.mark.parametrize("name", INTERNVL)
def test_a_loaded_processor_gives_the_same_constants_as_its_file(name: str) -> None:
    config = INTERNVL[name].config
    from_file = InternVlImages.from_preprocessor_config(config, tokens_per_side=4)
    loaded = load_processor(config).to_dict()
    assert InternVlImages.from_preprocessor_config(loaded, tokens_per_side=4) == from_file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "expected GotOcr2ImageProcessor, got 'CLIP"),
        ({"size": {"height": 4, "width": 5}}, "size: expected a square 'height' and 'width', got"),
        ({"do_resize": False}, "do_resize: expected true, got false"),
        ({"do_convert_rgb": False}, "do_convert_rgb: expected true, got false"),
        ({"resample": 0}, "preprocessor_config resample: expected one of"),
        ({"max_patches": 0}, r"Expected `int` >= 1 - at `\$.max_tiles`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_preprocessor_files_that_cannot_be_followed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        InternVlImages.from_preprocessor_config(
            {**INTERNVL["InternVL3"].config, **change}, tokens_per_side=16
        )


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match="expected mode 'RGB', got 'L'; read it with open_image"):
        SMALL.prepare(Image.new("L", (40, 40)))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="expected at least 1x1 pixels, got 0x4"):
        SMALL.grid(0, 4)


@pytest.mark.parametrize(("axis", "message"), [("B", "tiles"), ("N", "visual tokens")])
def test_a_picture_that_needs_more_than_the_graph_has_is_refused(axis: str, message: str) -> None:
    sizes = SMALL.sizes(100, 20)
    with pytest.raises(ImageError, match=f"at most {sizes[axis] - 1} {message}"):
        SMALL.prepare(noise_picture(100, 20), {**sizes, axis: sizes[axis] - 1})
