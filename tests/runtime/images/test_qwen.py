"""Patches of Qwen2.5-VL's and Qwen3-VL's pictures: the same counts, order and numbers as Hugging Face, within known bounds."""

import json

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from tests.pictures import PHOTOGRAPHS, photograph, random_picture
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.images.reading import open_image

CONFIGS = {
    "default": {},
    "unbounded": {"max_pixels": 12_845_056},
    "one_size": {"min_pixels": 1008**2, "max_pixels": 1008**2},
    "few_tokens": {"min_pixels": 1, "max_pixels": 3 * 28**2 + 5},
    "less_than_a_token": {"min_pixels": 1, "max_pixels": 100},
    "small_patches": {"patch_size": 3, "min_pixels": 500, "max_pixels": 4000},
    "merge_3": {"patch_size": 4, "merge_size": 3, "min_pixels": 1000, "max_pixels": 9000},
}
SIZES = [(1, 1), (28, 28), (41, 43), (1, 200), (300, 2), (112, 112), (113, 225), (640, 480), (2000, 300)]
EXACT = {"rtol": 0, "atol": 2e-7}
"""Both divide in float32; torch may use the reciprocal."""


def processing(name: str, *, window: int = 112) -> QwenImages:
    return QwenImages(**{"patch_size": 14, "window_size": window, **CONFIGS[name]})


def patch_grid(images: QwenImages, width: int, height: int) -> tuple[int, int]:
    """Return the rows and columns of patches."""
    rows, columns = images.token_grid(width, height)
    return rows * images.merge_size, columns * images.merge_size


def hugging_face(name: str) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(**CONFIGS[name])


PROCESSINGS = {name: processing(name) for name in CONFIGS}
PROCESSORS = {name: hugging_face(name) for name in CONFIGS}


@settings(max_examples=150)
@given(st.sampled_from(list(CONFIGS)), st.integers(1, 5000), st.integers(1, 5000))
@example("default", 14, 14)
@example("default", 42, 70)
@example("one_size", 100, 100)
@example("few_tokens", 2000, 10)
def test_counts_and_refusals_equal_hugging_face(name: str, width: int, height: int) -> None:
    try:
        expected = PROCESSORS[name].get_number_of_image_patches(height, width)
    except ValueError:
        with pytest.raises(ImageError, match="aspect ratio of at most 200"):
            patch_grid(PROCESSINGS[name], width, height)
        return
    rows, columns = patch_grid(PROCESSINGS[name], width, height)
    sizes = PROCESSINGS[name].sizes(width, height)
    assert rows * columns == sizes["P"] == expected
    assert np.prod(PROCESSINGS[name].token_grid(width, height)) == sizes["N"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["default", "one_size", "small_patches", "merge_3"])
def test_grid_equals_the_one_that_hugging_face_returns(name: str, size: tuple[int, int]) -> None:
    picture = random_picture(*size)
    theirs = PROCESSORS[name](picture, return_tensors="np")["image_grid_thw"][0].tolist()
    assert theirs == [1, *patch_grid(PROCESSINGS[name], *size)]


def expected_patches(picture: Image.Image, name: str) -> np.ndarray:
    """torchvision's resizing and normalization, then the processor's own patches, in its order."""
    ours, theirs = PROCESSINGS[name], PROCESSORS[name]
    rows, columns = patch_grid(ours, *picture.size)
    size = (rows * ours.patch_size, columns * ours.patch_size)
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(levels, size, mode="bicubic", antialias=True)[0]
    mean, std = (
        torch.tensor(values)[:, None, None] * (1.0 / theirs.rescale_factor)
        for values in (theirs.image_mean, theirs.image_std)
    )
    pixels = ((resized.float() - mean) / std).numpy()
    return theirs.patchify(pixels, ours.patch_size, ours.merge_size, ours.temporal_patch_size)[0]


@pytest.mark.parametrize("shown", [*SIZES, *PHOTOGRAPHS], ids=str)
@pytest.mark.parametrize("name", ["default", "small_patches", "merge_3"])
def test_patches_are_hugging_faces_in_window_order(name: str, shown: tuple[int, int] | str) -> None:
    picture = open_image(photograph(shown)) if isinstance(shown, str) else random_picture(*shown)
    ours = PROCESSINGS[name]
    inputs = ours.prepare(picture)
    grid = torch.tensor([[1, *patch_grid(ours, *picture.size)]])
    order, _ = get_vision_window_index(grid, ours.merge_size, ours.window_size, ours.patch_size)
    merged = ours.merge_size**2
    patches = expected_patches(picture, name).reshape(-1, merged, ours.patch_values)[order]
    np.testing.assert_allclose(inputs["pixel_values"].reshape(patches.shape), patches, **EXACT)
    positions = get_vision_position_ids(grid, ours.merge_size).reshape(-1, merged, 2)[order]
    np.testing.assert_array_equal(inputs["patch_positions"].T, positions.reshape(-1, 2))
    np.testing.assert_array_equal(inputs["token_index"], torch.argsort(order))


@settings(max_examples=60)
@given(
    st.sampled_from(["default", "small_patches", "merge_3"]),
    st.integers(1, 700),
    st.integers(1, 700),
    st.integers(1, 60),
)
@example("default", 640, 480, 48)
def test_the_table_of_positions_is_interpolated_as_hugging_face_does(
    name: str, width: int, height: int, side: int
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    ours = Qwen3Images(**{"patch_size": 14, "table_size": side, **CONFIGS[name]})
    inputs = ours.prepare(Image.new("RGB", (width, height)))
    grid = torch.tensor([[1, *patch_grid(ours, width, height)]])
    index, weights = get_vision_interpolation_indices_and_weights(
        grid, side, align_corners=True, spatial_merge_size=ours.merge_size
    )
    np.testing.assert_array_equal(inputs["table_index"].T, index)
    np.testing.assert_allclose(inputs["table_weights"].T, weights, rtol=0, atol=1e-5)
    positions = get_vision_position_ids(grid, ours.merge_size)
    np.testing.assert_array_equal(inputs["patch_positions"].T, positions)
    np.testing.assert_array_equal(inputs["token_index"], np.arange(ours.sizes(width, height)["N"]))


@pytest.mark.parametrize("window", [28, 56, 112, 100])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_windows_are_hugging_faces(window: int, size: tuple[int, int]) -> None:
    ours = processing("default", window=window)
    inputs = ours.prepare(random_picture(*size))
    _, ends = get_vision_window_index(torch.tensor([[1, *patch_grid(ours, *size)]]), 2, window, 14)
    slots = inputs["window_slots"]
    assert (slots >= 0).sum(axis=1).tolist() == np.diff(ends.numpy()).tolist()
    assert slots.shape == (ours.sizes(*size)["W"], ours.slots_per_window)
    np.testing.assert_array_equal(slots[slots >= 0], np.arange(ours.sizes(*size)["P"]))
    np.testing.assert_array_equal(slots.ravel()[inputs["patch_slot"]], np.arange(len(inputs["patch_slot"])))


def test_bilinear_and_unnormalized_pictures_are_followed() -> None:
    ours = QwenImages(patch_size=14, window_size=112, resample="bilinear", do_normalize=False)
    picture = random_picture(100, 70)
    levels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    size = [14 * patches for patches in patch_grid(ours, 100, 70)]
    resized = torch.nn.functional.interpolate(levels, size, mode="bilinear", antialias=True)[0]
    inputs = ours.prepare(picture)
    patches = PROCESSORS["default"].patchify(resized.numpy() * np.float32(1 / 255), 14, 2, 2)[0]
    tokens = inputs["pixel_values"].reshape(-1, 4, 1176)[inputs["token_index"]]
    np.testing.assert_allclose(tokens.reshape(patches.shape), patches, **EXACT)


def test_padding_repeats_the_first_patch_and_adds_empty_windows() -> None:
    ours, picture = PROCESSINGS["default"], random_picture(150, 90)
    exact = ours.prepare(picture)
    own = ours.sizes(150, 90)
    padded = ours.prepare(picture, sizes={"P": own["P"] + 8, "W": own["W"] + 3, "N": own["N"] + 1})
    for name, axis, count in [
        ("pixel_values", 0, own["P"]),
        ("patch_positions", 1, own["P"]),
        ("patch_slot", 0, own["P"]),
        ("token_index", 0, own["N"]),
    ]:
        real, padding = np.split(padded[name], [count], axis=axis)
        np.testing.assert_array_equal(real, exact[name])
        np.testing.assert_array_equal(padding, padding * 0 + exact[name].take([0], axis=axis))
    np.testing.assert_array_equal(padded["window_slots"][: own["W"]], exact["window_slots"])
    assert (padded["window_slots"][own["W"] :] == -1).all()
    assert padded["num_patches"].tolist() == [own["P"]]


def test_inputs_have_the_graphs_types() -> None:
    types = {
        name: str(array.dtype)
        for name, array in PROCESSINGS["default"].prepare(random_picture(60, 90)).items()
    }
    assert types.pop("pixel_values") == "float32"
    assert set(types.values()) == {"int32"}


@settings(max_examples=300)
@given(st.sampled_from(list(CONFIGS)), st.integers(1, 6000), st.floats(1, 200), st.booleans())
@example("one_size", 1, 200.0, False)
@example("few_tokens", 40, 200.0, True)
@example("one_size", 700, 1.037, False)
def test_no_picture_exceeds_the_largest_sizes(name: str, short: int, ratio: float, tall: bool) -> None:
    size = (short, int(short * ratio))
    own = PROCESSINGS[name].sizes(*(size if tall else size[::-1]))
    largest = PROCESSINGS[name].any_image_sizes()[0]
    assert all(own[axis] <= largest[axis] for axis in own)


@settings(max_examples=200)
@given(
    st.integers(1, 40_000),
    st.integers(0, 40_000),
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 4),
)
def test_no_picture_exceeds_the_largest_sizes_of_any_range(
    least: int, more: int, width: int, height: int, window: int
) -> None:
    ours = QwenImages(patch_size=3, window_size=6 * window, min_pixels=least, max_pixels=least + more)
    if max(width, height) <= 200 * min(width, height):
        own, largest = ours.sizes(width, height), ours.any_image_sizes()[0]
        assert all(own[axis] <= largest[axis] for axis in own)


@pytest.mark.parametrize(
    ("name", "size", "axis"),
    [
        ("default", (1120, 896), "N"),  # 40 x 32 tokens: all of max_pixels
        ("default", (7168, 140), "W"),  # 5 x 256 tokens: a second row of windows for one row of tokens
        ("one_size", (144 * 19, 19), "N"),  # 4 x 433 tokens, not 3 x 432: float64 lands above whole numbers
        ("few_tokens", (5600, 28), "N"),  # 1 x 24 tokens, not 3: one row stays
    ],
)
def test_the_largest_sizes_are_reached(name: str, size: tuple[int, int], axis: str) -> None:
    assert PROCESSINGS[name].sizes(*size)[axis] == PROCESSINGS[name].any_image_sizes()[0][axis]


@pytest.mark.parametrize("size", [(300, 200), (57, 400)], ids=str)
def test_boxes_lie_where_their_tokens_look(size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    ours = QwenImages(patch_size=14, window_size=112, do_normalize=False, do_rescale=False)
    inputs = ours.prepare(picture)
    seen = inputs["pixel_values"].reshape(-1, 4, 3, 2 * 14**2).mean(axis=(1, 3))[inputs["token_index"]]
    boxes = ours.layout(*size).boxes
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 255
    np.testing.assert_allclose(seen[:, :2], middle, atol=3)
    assert boxes.shape == (ours.sizes(*size)["N"], 4)
    assert boxes.min() == 0
    assert boxes.max(axis=0).tolist() == [size[0], size[1]] * 2 or boxes[-1, 2:].tolist() == list(size)


def test_constants_survive_json() -> None:
    ours = PROCESSINGS["small_patches"]
    values = json.loads(json.dumps(ours.to_dict()))
    assert values["kind"] == "patches"
    assert QwenImages.from_dict(values) == ours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "single"}, r"Invalid value 'single' - at `\$.kind`"),
        ({"colour": 1}, "unknown field `colour`"),
        ({"patch_size": 0}, r"Expected `int` >= 1 - at `\$.patch_size`"),
        ({"merge_size": 2.0}, r"Expected `int`, got `float` - at `\$.merge_size`"),
        ({"window_size": 27}, r"window_size: expected >= 28 \(patch_size \* merge_size\), got 27"),
        ({"min_pixels": 2_000_000}, "min_pixels: expected <= max_pixels 1003520, got 2000000"),
        ({"resample": "nearest"}, r"Invalid enum value 'nearest' - at `\$.resample`"),
        ({"image_std": [0, 1, 1]}, r"Expected `float` > 0.0 - at `\$.image_std\[0\]`"),
        ({"image_mean": 3}, r"Expected `array`, got `int` - at `\$.image_mean`"),
        ({"do_normalize": 1}, r"Expected `bool`, got `int` - at `\$.do_normalize`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_that_break_a_rule_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        QwenImages.from_dict({**PROCESSINGS["default"].to_dict(), **change})


def test_a_missing_key_is_refused() -> None:
    values = PROCESSINGS["default"].to_dict()
    del values["window_size"]
    with pytest.raises(ManifestError, match="window_size"):
        QwenImages.from_dict(values)


OLD_FILE = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12_845_056}
NEW_FILE = {
    "image_processor_type": "Qwen2VLImageProcessorFast",
    "size": {"shortest_edge": 3136, "longest_edge": 12_845_056},
    "min_pixels": None,
    "max_pixels": None,
    "do_convert_rgb": True,
    "resample": 3,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


@pytest.mark.parametrize(
    "config",
    [OLD_FILE, NEW_FILE, {**OLD_FILE, "size": {"min_pixels": 3136, "max_pixels": 12_845_056}}],
    ids=["old", "new", "both"],
)
def test_old_and_new_preprocessor_files_mean_the_same(config: dict) -> None:
    expected = QwenImages(patch_size=14, window_size=112, max_pixels=12_845_056)
    assert QwenImages.from_preprocessor_config(config, window_size=112) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_processor_gives_the_same_constants_as_its_keywords(name: str) -> None:
    loaded = QwenImages.from_preprocessor_config(PROCESSORS[name].to_dict(), window_size=112)
    assert loaded == PROCESSINGS[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "got 'CLIPImageProcessor'"),
        ({"do_resize": False}, "do_resize: expected true, got false"),
        ({"do_convert_rgb": False}, "do_convert_rgb: expected true, got false"),
        ({"resample": 0}, "preprocessor_config resample: expected one of"),
        ({"size": {"height": 4, "width": 4}}, "size: expected areas 'shortest_edge' and 'longest_edge'"),
        ({"patch_size": [14, 14]}, r"Expected `int`, got `array` - at `\$.patch_size`"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_preprocessor_files_that_cannot_be_followed_are_refused(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QwenImages.from_preprocessor_config({**NEW_FILE, **change}, window_size=112)


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ImageError, match="expected mode 'RGB', got 'L'; read it with open_image"):
        PROCESSINGS["default"].prepare(Image.new("L", (40, 40)))


def test_a_picture_without_pixels_is_refused() -> None:
    with pytest.raises(ImageError, match="expected at least 1x1 pixels, got 0x4"):
        PROCESSINGS["default"].token_grid(0, 4)


@pytest.mark.parametrize(
    ("axis", "message"), [("N", "visual tokens"), ("P", "patches"), ("W", "attention windows")]
)
def test_a_picture_that_needs_more_than_the_graph_has_is_refused(axis: str, message: str) -> None:
    sizes = PROCESSINGS["default"].sizes(300, 200)
    with pytest.raises(ImageError, match=f"at most {sizes[axis] - 1} {message}"):
        PROCESSINGS["default"].prepare(random_picture(300, 200), sizes={**sizes, axis: sizes[axis] - 1})
