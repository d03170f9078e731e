import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from tests.hugging_face import lays_over_white
from tests.pictures import noise_picture
from tests.torchvision_reference import (
    LARGER_THAN_EXACT,
    MODES,
    MODES_SIZE,
    PROCESSORS,
    TorchvisionReference,
    load_processor,
)
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.images.resizing import MAX_EXACT_PIXELS

LLAVA_CLASSES = (
    "CLIPImageProcessor",
    "LlavaImageProcessor",
    "LlavaNextImageProcessor",
    "LlavaOnevisionImageProcessor",
)
LLAVA = {
    name: processor
    for name, processor in PROCESSORS.items()
    if processor.config["image_processor_type"] in LLAVA_CLASSES
}
CONFIGS = {name: processor.config for name, processor in LLAVA.items()}
NEXT = LlavaImages.from_preprocessor_config(CONFIGS["LLaVA-NeXT"], patch_size=14)
SINGLE = LlavaImages.from_preprocessor_config(CONFIGS["LLaVA-1.5"], patch_size=14)
SMALL = LlavaImages(
    kind="anyres",
    tile_size=28,
    patch_size=4,
    resize_size=28,
    grid_pinpoints=((28, 56), (56, 28), (56, 56), (28, 84)),
)
VALID = NEXT.to_dict()


def _levels(pixel_values: np.ndarray, processing: LlavaImages) -> np.ndarray:
    if not processing.do_normalize:
        return pixel_values / processing.rescale_factor
    mean, std = (np.array(values)[:, None, None] for values in (processing.image_mean, processing.image_std))
    return (pixel_values * std + mean) / processing.rescale_factor


def _reference_pack(width: int, height: int, processing: LlavaImages, features: torch.Tensor) -> torch.Tensor:
    vision = SimpleNamespace(image_size=processing.tile_size, patch_size=processing.patch_size)
    pinpoints = [list(pinpoint) for pinpoint in processing.grid_pinpoints]
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=pinpoints))
    per_tile = features[:-1].view(-1, processing.patches_per_tile, features.shape[-1])
    packed, _ = LlavaNextModel.pack_image_features(
        model, [per_tile], [(height, width)], "default", image_newline=features[-1]
    )
    return packed[0]


def _reference_num_tokens(width: int, height: int, processing: LlavaImages) -> int:
    pinpoints = [list(pinpoint) for pinpoint in processing.grid_pinpoints]
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_grid_pinpoints=pinpoints),
        patch_size=processing.patch_size,
        num_additional_image_tokens=1,
    )
    processor._get_unpadded_features = partial(LlavaNextProcessor._get_unpadded_features, processor)
    side = processing.tile_size
    return LlavaNextProcessor._get_number_of_features(processor, height, width, side, side) - 1


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, id=f"{name}-{size}")
        for name, processor in LLAVA.items()
        for size in processor.sizes
        if size != LARGER_THAN_EXACT
    ],
)
def test_pixels_equal_the_processor_that_hugging_face_uses_by_default(
    name, size, torchvision_reference: TorchvisionReference
):
    processing = LlavaImages.from_preprocessor_config(CONFIGS[name], patch_size=14)

    ours = processing.prepare(noise_picture(*size))["pixel_values"]
    theirs = torchvision_reference.theirs(name, size)["pixel_values"]

    theirs = theirs[0] if processing.kind == "anyres" else theirs
    assert ours.shape == theirs.shape
    by_pillow = processing.do_pad and max(size) ** 2 > MAX_EXACT_PIXELS
    levels, expected = _levels(ours, processing), _levels(theirs, processing)
    np.testing.assert_allclose(levels, expected, atol=1.01 if by_pillow else 0.01)


def test_a_picture_larger_than_the_exact_limit_is_within_one_level(torchvision_reference):
    theirs = torchvision_reference.theirs("LLaVA-NeXT", LARGER_THAN_EXACT)["pixel_values"][0]
    ours = NEXT.prepare(noise_picture(*LARGER_THAN_EXACT))["pixel_values"]
    np.testing.assert_allclose(_levels(ours, NEXT), _levels(theirs, NEXT), atol=1.01)


@lays_over_white
@pytest.mark.parametrize("mode", MODES)
def test_pil_images_of_other_modes_equal_hugging_face(mode, torchvision_reference):
    theirs = torchvision_reference.theirs("LLaVA-1.5", MODES_SIZE, mode=mode)["pixel_values"]
    ours = SINGLE.prepare(open_image(noise_picture(*MODES_SIZE, mode=mode)))["pixel_values"]
    np.testing.assert_allclose(_levels(ours, SINGLE), _levels(theirs, SINGLE), atol=1.01)


def test_a_picture_of_one_row_needs_no_huge_memory():
    assert SINGLE.prepare(noise_picture(4000, 1))["pixel_values"].shape == (1, 3, 336, 336)


def test_a_narrow_picture_that_would_be_a_huge_square_is_refused():
    padded = LlavaImages.from_preprocessor_config(CONFIGS["LLaVA-1.5 padded"], patch_size=14)
    several = LlavaImages.from_preprocessor_config(CONFIGS["LLaVA-OneVision"], patch_size=14)
    several = LlavaImages.from_dict({**several.to_dict(), "max_grid_tiles": 9}).of_several()
    for processing in (padded, several):
        with pytest.raises(ImageError, match=r"padded to 9000x9000 pixels in memory, got 9000x2; crop"):
            processing.prepare(Image.new("RGB", (9000, 2)))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([SMALL, NEXT]))
def test_the_gather_equals_hugging_face_pack_image_features(width, height, processing):
    num_rows = processing.sizes(width, height)["B"] * processing.patches_per_tile + 1
    features = torch.arange(num_rows, dtype=torch.float32)[:, None]
    index = processing.token_index(width, height)
    assert index.dtype == np.int32
    packed = _reference_pack(width, height, processing, features)
    np.testing.assert_array_equal(index, packed[:, 0].numpy().astype(int))


@pytest.mark.parametrize(
    "size", [(1, 1), (4000, 1), (1, 4000), (4000, 3), (7, 4000), (5000, 40), (672, 336), (1008, 336)], ids=str
)
def test_the_gather_equals_hugging_face_for_extreme_sizes(size):
    num_rows = NEXT.sizes(*size)["B"] * NEXT.patches_per_tile + 1
    packed = _reference_pack(*size, NEXT, torch.arange(num_rows, dtype=torch.float32)[:, None])
    np.testing.assert_array_equal(NEXT.token_index(*size), packed[:, 0].numpy().astype(int))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([SMALL, NEXT]))
def test_the_number_of_visual_tokens_equals_hugging_face_placeholders(width, height, processing):
    assert processing.sizes(width, height)["N"] == _reference_num_tokens(width, height, processing)
    assert len(processing.token_index(width, height)) == processing.sizes(width, height)["N"]


def test_a_single_tile_uses_every_patch_once():
    np.testing.assert_array_equal(SINGLE.token_index(640, 480), np.arange(576))


def test_padding_tiles_moves_the_newline_and_adds_zeros():
    own = SMALL.sizes(30, 50)
    plain, padded = (SMALL.prepare(noise_picture(30, 50), sizes) for sizes in (own, {**own, "B": 7}))
    newline, patches = own["B"] * SMALL.patches_per_tile, SMALL.patches_per_tile
    np.testing.assert_array_equal(
        np.where(plain["token_index"] == newline, 7 * patches, plain["token_index"]), padded["token_index"]
    )
    np.testing.assert_array_equal(padded["pixel_values"][: own["B"]], plain["pixel_values"])
    assert not padded["pixel_values"][own["B"] :].any()
    assert len(plain["token_index"]) == own["N"]


@pytest.mark.parametrize("processing", [SMALL, SINGLE], ids=["anyres", "single"])
def test_no_picture_size_exceeds_the_maxima_and_some_reach_them(processing):
    sizes = [(width, height) for width in range(1, 130) for height in range(1, 130)]
    assert max(processing.sizes(*size)["N"] for size in sizes) == processing.any_image_sizes()[-1]["N"]
    assert max(processing.sizes(*size)["B"] for size in sizes) == processing.any_image_sizes()[-1]["B"]


def test_llava_next_has_at_most_2928_visual_tokens_in_5_tiles():
    assert (NEXT.any_image_sizes()[-1]["N"], NEXT.any_image_sizes()[-1]["B"]) == (2928, 5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(90, 60), (60, 91), (200, 13)], ids=str)
def test_boxes_lie_in_the_picture_and_newlines_have_none(name, size):
    processing = LlavaImages.from_preprocessor_config(CONFIGS[name], patch_size=14)
    boxes = processing.layout(*size).boxes
    index = processing.token_index(*size)
    assert boxes.shape == (len(index), 4)
    assert boxes.dtype == np.float32
    newline = processing.sizes(*size)["B"] * processing.patches_per_tile
    np.testing.assert_array_equal(np.isnan(boxes[:, 0]), index == newline)
    real = boxes[index != newline]
    assert (real[:, :2] <= real[:, 2:]).all()
    assert (real >= 0).all()
    assert (real[:, 2:] <= size).all()


@pytest.mark.parametrize("name", ["LLaVA-NeXT", "LLaVA-1.5", "LLaVA-1.5 padded", "tiles resized again"])
@pytest.mark.parametrize("size", [(500, 300), (300, 500)], ids=str)
def test_a_box_shows_what_its_patch_sees(name, size):
    """A horizontal and a vertical ramp: a patch's mean colour tells where in the picture it looks."""
    processing = LlavaImages.from_preprocessor_config(CONFIGS[name], patch_size=14)
    x, y = np.meshgrid(np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5)
    pixels = np.stack([x / size[0] * 255, y / size[1] * 255, np.full_like(x, 128)], axis=-1)
    prepared = processing.prepare(Image.fromarray(pixels.round().astype(np.uint8)))

    n, p = processing.patches_per_side, processing.patch_size
    levels = _levels(prepared["pixel_values"], processing).reshape(-1, 3, n, p, n, p).mean(axis=(3, 5))
    seen = levels.transpose(0, 2, 3, 1).reshape(-1, 3)[
        np.minimum(prepared["token_index"], levels[:, 0].size - 1)
    ]
    boxes = processing.layout(*size).boxes
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 255
    inside = (
        np.isfinite(boxes[:, 0])
        & (boxes[:, :2] > 2).all(axis=1)
        & (boxes[:, 2:] < np.array(size) - 2).all(axis=1)
    )
    assert inside.sum() > 0.5 * np.isfinite(boxes[:, 0]).sum() * (0.6 if "padded" in name else 1)
    np.testing.assert_allclose(seen[inside][:, :2], middle[inside], atol=3)


def test_boxes_of_taken_tokens_outlive_the_memory_that_named_the_tokens():
    layout = NEXT.layout(500, 300)
    indices = np.array([3, 7], np.int32)
    taken = layout.taken(indices)
    indices[:] = 0  # as the next image's indices do
    np.testing.assert_array_equal(taken.boxes, layout.boxes[[3, 7]])


def test_constants_survive_json():
    assert LlavaImages.from_dict(json.loads(json.dumps(VALID))) == NEXT


def test_an_unknown_key_is_refused():
    with pytest.raises(ManifestError, match="unknown field `colour`"):
        LlavaImages.from_dict({**VALID, "colour": 1})


def test_a_missing_key_is_refused():
    with pytest.raises(ManifestError, match="patch_size"):
        LlavaImages.from_dict({key: value for key, value in VALID.items() if key != "patch_size"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "many"}, r"Invalid enum value 'many' - at `\$.kind`"),
        ({"resample": "nearest"}, r"Invalid enum value 'nearest' - at `\$.resample`"),
        ({"tile_size": 0}, r"Expected `int` >= 1 - at `\$.tile_size`"),
        ({"patch_size": 1000}, "patch_size: expected <= tile_size 336, got 1000"),
        ({"do_resize": 1}, r"Expected `bool`, got `int` - at `\$.do_resize`"),
        ({"image_std": [0, 1, 1]}, r"Expected `float` > 0.0 - at `\$.image_std\[0\]`"),
        ({"image_mean": [1, 2]}, r"Expected `array` of length 3, got 2 - at `\$.image_mean`"),
        ({"image_mean": [math.nan, 0.5, 0.5]}, r"Expected `float` .* at `\$.image_mean\[0\]`"),
        ({"image_std": [1, 1, math.inf]}, r"Expected `float` .* at `\$.image_std\[2\]`"),
        ({"rescale_factor": 0}, r"Expected `float` > 0.0 - at `\$.rescale_factor`"),
        ({"grid_pinpoints": []}, "grid_pinpoints: expected some"),
        ({"grid_pinpoints": [[336, 500]]}, r"multiples of tile_size 336, got \(336, 500\)"),
        ({"do_pad": True}, "do_pad: expected false"),
        ({"do_center_crop": False, "resize_size": 400}, "do_center_crop: expected true unless"),
        ({"image_mean": 3}, r"Expected `array`, got `int` - at `\$.image_mean`"),
    ],
)
def test_values_that_break_a_rule_are_refused(change, message):
    with pytest.raises(ManifestError, match=message):
        LlavaImages.from_dict({**VALID, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "SiglipImageProcessor"}, "got 'SiglipImageProcessor'"),
        ({"size": {"height": 336, "width": 224}}, "size: expected a square or a shortest edge"),
        ({"resample": 0}, "preprocessor_config resample: expected one of"),
        ({"do_convert_rgb": False}, "do_convert_rgb: expected true, got false"),
    ],
)
def test_preprocessor_configs_that_cannot_be_followed_are_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        LlavaImages.from_preprocessor_config({**CONFIGS["LLaVA-1.5"], **change}, patch_size=14)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_loaded_processor_gives_the_same_constants_as_its_file(name, torchvision_reference):
    constants = torchvision_reference.constants(name)
    from_file = LlavaImages.from_preprocessor_config(CONFIGS[name], patch_size=14)
    assert LlavaImages.from_preprocessor_config(constants, patch_size=14) == from_file


@pytest.mark.parametrize("name", CONFIGS)
def test_a_processor_loaded_without_torchvision_gives_the_same_constants_as_its_file(name):
    constants = load_processor(CONFIGS[name]).to_dict()
    from_file = LlavaImages.from_preprocessor_config(CONFIGS[name], patch_size=14)
    assert LlavaImages.from_preprocessor_config(constants, patch_size=14) == from_file


def test_a_picture_that_is_not_rgb_is_refused():
    with pytest.raises(ImageError, match="expected mode 'RGB', got 'L'; read it with open_image"):
        SINGLE.prepare(Image.new("L", (4, 4)))


def test_a_picture_with_too_many_tiles_is_refused():
    with pytest.raises(ImageError, match="expected at most 2 tiles"):
        SMALL.prepare(noise_picture(60, 60), {"B": 2})


def test_a_size_without_pixels_is_refused():
    with pytest.raises(ImageError, match="expected at least 1x1 pixels, got 0x4"):
        SINGLE.sizes(0, 4)["N"]
