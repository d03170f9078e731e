"""Tiles of SmolVLM2's pictures and the text between them: the same grids, counts, numbers and words as Hugging Face."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.smolvlm.image_processing_pil_smolvlm import (
    SmolVLMImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from tests.pictures import noise_picture, random_picture
from tests.torchvision_reference import PROCESSORS, TorchvisionReference, load_processor
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.tiles import SmolVlmImages

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMOLVLM = {name: entry for name, entry in PROCESSORS.items() if name.startswith("SmolVLM2")}
LARGEST_RELEASED = SmolVlmImages(tile_size=384, token_size=42, longest_edge=1536)
RELEASED = SmolVlmImages(tile_size=512, token_size=64, longest_edge=2048)
SMALL = SmolVlmImages(tile_size=24, token_size=8, longest_edge=72)
UNSEEN_EDGE = SmolVlmImages(tile_size=26, token_size=8, longest_edge=60)
ROUNDED_UP = SmolVlmImages(tile_size=27, token_size=9, longest_edge=27)
ONE_TILE = SmolVlmImages(tile_size=30, token_size=10, longest_edge=90, do_image_splitting=False)
ALL = {
    "released": RELEASED,
    "largest_released": LARGEST_RELEASED,
    "small": SMALL,
    "unseen_edge": UNSEEN_EDGE,
    "rounded_up": ROUNDED_UP,
    "odd": SmolVlmImages(tile_size=34, token_size=17, longest_edge=101),
    "larger_than_hugging_face_makes": SmolVlmImages(tile_size=500, token_size=250, longest_edge=5001),
    "one_tile": ONE_TILE,
}
TINY = [name for name in ALL if ALL[name].tile_size < 100]
SIZES = [(1, 1), (24, 24), (48, 48), (49, 47), (100, 20), (20, 100), (1, 300), (300, 1), (71, 50), (2, 3)]


def levels(pixel_values: NDArray[np.float32], processing: SmolVlmImages) -> NDArray[np.float32]:
    mean, std = (np.array(values)[:, None, None] for values in (processing.image_mean, processing.image_std))
    result: NDArray[np.float32] = (pixel_values * std + mean) / processing.rescale_factor
    return result


class ShapesOnly(SmolVLMImageProcessorPil):
    """Hugging Face's processor for pictures that have a shape and no pixels."""

    def resize(self, image: Any, size: SizeDict, resample: Any = None, **_: Any) -> Any:
        height, width = size.height, size.width
        if size.longest_edge:
            height, width = get_resize_output_image_size(image, size.longest_edge)
        return np.broadcast_to(np.uint8(0), (3, height, width))


def their_grid(images: SmolVlmImages, width: int, height: int) -> tuple[int, int]:
    """Return Hugging Face's rows and columns, which are 0, 0 where a picture is one tile."""
    if not images.do_image_splitting:
        return 0, 0
    processor = ShapesOnly()
    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    resized = processor.resize(picture, SizeDict(longest_edge=images.longest_edge))
    stretched = processor.resize_for_vision_encoder(resized, images.tile_size)
    _, rows, columns = processor.split_images(stretched, {"longest_edge": images.tile_size})
    return rows, columns


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(ALL)), st.integers(1, 5000), st.integers(1, 5000))
@example("released", 1, 5000)
@example("released", 100_000, 1)
@example("released", 2048, 1537)
@example("rounded_up", 30, 30)
@example("small", 73, 72)
def test_grids_counts_and_text_equal_hugging_face(name: str, width: int, height: int) -> None:
    ours, marks = ALL[name], ("<fake_token_around_image>", "<image>", "<global-img>")
    rows, columns = their_grid(ours, width, height)
    assert ours.grid(width, height) == (rows or 1, columns or 1)
    tiles = rows * columns + 1
    assert ours.sizes(width, height) == {"B": tiles, "N": tiles * ours.tokens_per_tile}
    layout = ours.layout(width, height)
    assert layout.run_lengths == (ours.tokens_per_tile,) * tiles
    between = marks[1] * ours.tokens_per_tile
    assert between.join(layout.text) == get_image_prompt_string(rows, columns, ours.tokens_per_tile, *marks)


def test_text_names_each_tile_once_and_breaks_the_line_after_each_row() -> None:
    assert SMALL.text(2, 2) == (
        "<fake_token_around_image><row_1_col_1>",
        "<fake_token_around_image><row_1_col_2>",
        "\n<fake_token_around_image><row_2_col_1>",
        "<fake_token_around_image><row_2_col_2>",
        "\n\n<fake_token_around_image><global-img>",
        "<fake_token_around_image>",
    )
    assert SMALL.text(1, 1) == ("<fake_token_around_image><global-img>", "<fake_token_around_image>")


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name}-{size}") for name in SMOLVLM for size in SMOLVLM[name].sizes],
)
def test_pixels_equal_the_processor_that_hugging_face_uses_by_default(
    name: str, size: tuple[int, int], torchvision_reference: TorchvisionReference
) -> None:
    ours = SmolVlmImages.from_preprocessor_config(SMOLVLM[name].config, token_size=9)
    pixels = ours.prepare(noise_picture(*size))["pixel_values"]
    theirs = torchvision_reference.theirs(name, size)
    rows, columns = int(theirs["rows"][0, 0]), int(theirs["cols"][0, 0])
    assert ours.grid(*size) == (rows or 1, columns or 1)
    np.testing.assert_allclose(levels(pixels, ours), levels(theirs["pixel_values"][0], ours), atol=0.01)
    assert theirs["pixel_attention_mask"].all()  # every tile is full


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tiles_come_in_the_order_of_hugging_faces_pillow_processor(size: tuple[int, int], name: str) -> None:
    """Pillow's resizing differs by a few levels, and the second one adds to the first."""
    ours = ALL[name]
    theirs = SmolVLMImageProcessorPil(
        size={"longest_edge": ours.longest_edge},
        max_image_size={"longest_edge": ours.tile_size},
        do_image_splitting=ours.do_image_splitting,
    )
    picture = random_picture(*size)
    expected = theirs(picture, return_tensors="np")["pixel_values"][0]
    pixels = ours.prepare(picture)["pixel_values"]
    np.testing.assert_allclose(levels(pixels, ours), levels(expected, ours), atol=4.01)


def test_the_released_models_have_up_to_17_tiles() -> None:
    assert RELEASED.any_image_sizes() == tuple({"B": count, "N": 17 * 64} for count in (5, 9, 17))
    assert LARGEST_RELEASED.any_image_sizes() == tuple({"B": count, "N": 17 * 81} for count in (5, 9, 17))


@pytest.mark.parametrize("name", ALL)
def test_every_picture_has_room_in_the_sizes_for_any_picture(name: str) -> None:
    shapes = ALL[name].any_image_sizes()
    own = [ALL[name].sizes(width, height) for width in range(1, 250, 7) for height in range(1, 250, 7)]
    own += [ALL[name].sizes(width, height) for width, height in [(1, 9000), (9000, 1), (5000, 4999), (1, 1)]]
    assert max(sizes["B"] for sizes in own) == shapes[-1]["B"]
    assert max(sizes["N"] for sizes in own) == shapes[-1]["N"]
    assert min(sizes["B"] for sizes in own) == shapes[0]["B"]
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


@pytest.mark.parametrize("name", ["small", "unseen_edge", "one_tile"])
@pytest.mark.parametrize("size", [(300, 200), (120, 400), (40, 40)], ids=str)
def test_a_box_shows_what_its_token_sees(size: tuple[int, int], name: str) -> None:
    """A horizontal and a vertical ramp: a token's mean colour tells where in the picture it looks."""
    images = ALL[name]
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    picture = Image.fromarray((255 * np.stack([x, y, x], axis=-1)).round().astype(np.uint8))
    boxes = images.layout(*size).boxes
    per_side, side = images.tokens_per_side, images.token_size
    seen = levels(images.prepare(picture)["pixel_values"], images)[..., : per_side * side, : per_side * side]
    seen = seen.reshape(-1, 3, per_side, side, per_side, side).mean(axis=(3, 5))
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 255
    np.testing.assert_allclose(seen.transpose(0, 2, 3, 1).reshape(-1, 3)[:, :2], middle, atol=3)
    assert boxes.shape == (images.sizes(*size)["N"], 4)
    assert boxes.dtype == np.float32


def test_the_whole_pictures_tile_comes_last() -> None:
    layout = SMALL.layout(300, 200)
    tokens = layout.overview
    boxes = layout.boxes[tokens.start : tokens.stop]
    assert (len(boxes), tokens.stop) == (SMALL.tokens_per_tile, SMALL.sizes(300, 200)["N"])
    np.testing.assert_allclose([*boxes[0, :2], *boxes[-1, 2:]], [0, 0, 300, 200], rtol=1e-6)


def test_a_single_tile_has_no_overview() -> None:
    assert (ONE_TILE.sizes(20, 20)["B"], len(ONE_TILE.layout(20, 20).overview)) == (1, 0)


def test_constants_survive_json() -> None:
    values = json.loads(json.dumps(ONE_TILE.to_dict()))
    assert values["kind"] == "named_tiles"
    assert SmolVlmImages.from_dict(values) == ONE_TILE


def test_a_manifests_constants_give_the_named_tiles() -> None:
    pictures = image_processing(SMALL.to_dict(), encoder_keep=None)
    assert isinstance(pictures, SmolVlmImages)
    assert pictures == SMALL


def test_a_manifest_with_encoder_reduction_is_refused() -> None:
    with pytest.raises(ManifestError, match="encoder_keep: expected none with kind 'named_tiles', got 32"):
        image_processing(SMALL.to_dict(), encoder_keep=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "patches"}, r"Invalid value 'patches' - at `\$.kind`"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"tile_size": 0}, r"Expected `int` >= 1 - at `\$.tile_size`"),
        ({"longest_edge": 2.0}, r"Expected `int`, got `float` - at `\$.longest_edge`"),
        ({"token_size": 25}, "token_size: expected <= tile_size 24, got 25"),
        ({"image_mark": None}, r"Expected `str`, got `null` - at `\$.image_mark`"),
        ({"resample": "nearest"}, r"Invalid enum value 'nearest' - at `\$.resample`"),
        ({"image_std": [0, 1, 1]}, r"Expected `float` > 0.0 - at `\$.image_std\[0\]`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_break_a_rule_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        SmolVlmImages.from_dict({**SMALL.to_dict(), **change})


def test_a_missing_key_is_refused() -> None:
    values = SMALL.to_dict()
    del values["token_size"]
    with pytest.raises(ManifestError, match="token_size"):
        SmolVlmImages.from_dict(values)


def test_missing_keys_of_a_file_are_hugging_faces_defaults() -> None:
    from_file = SmolVlmImages.from_preprocessor_config(
        {"image_processor_type": "SmolVLMImageProcessorFast"}, token_size=28
    )
    theirs = SmolVLMImageProcessorPil().to_dict()
    assert SmolVlmImages.from_preprocessor_config(theirs, token_size=28) == from_file
    assert from_file == SmolVlmImages(tile_size=364, token_size=28)


@pytest.mark.parametrize("name", SMOLVLM)
def test_a_loaded_processor_gives_the_same_constants_as_its_file(name: str) -> None:
    config = SMOLVLM[name].config
    from_file = SmolVlmImages.from_preprocessor_config(config, token_size=4)
    loaded = load_processor(config).to_dict()
    assert SmolVlmImages.from_preprocessor_config(loaded, token_size=4) == from_file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "expected SmolVLMImageProcessor, got 'CLIP"),
        ({"size": {"height": 4, "width": 5}}, "size: expected a 'longest_edge' and no other, got"),
        ({"max_image_size": 384}, "expected values that trio-edge can follow"),
        ({"max_image_size": {"longest_edge": "x"}}, "expected values that trio-edge can follow"),
        ({"do_resize": False}, "do_resize: expected true, got false"),
        ({"do_convert_rgb": False}, "do_convert_rgb: expected true, got false"),
        ({"resample": 0}, "preprocessor_config resample: expected one of"),
        ({"do_image_splitting": "yes"}, r"Expected `bool`, got `str` - at `\$.do_image_splitting`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_preprocessor_files_that_cannot_be_followed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SmolVlmImages.from_preprocessor_config({**SMOLVLM["SmolVLM2"].config, **change}, token_size=42)


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
