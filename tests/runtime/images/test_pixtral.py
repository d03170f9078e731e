"""Patches of Ministral 3's pictures and the marks between rows: the same grids, numbers and words as Hugging Face."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.pixtral.image_processing_pil_pixtral import (
    PixtralImageProcessorPil,
    get_resize_output_image_size,
)

from tests.mistral3_checkpoints import whole_image
from tests.pictures import noise_picture
from tests.torchvision_reference import PROCESSORS, TorchvisionReference, load_processor
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.pixtral import PixtralImages

PIXTRAL = {name: entry for name, entry in PROCESSORS.items() if name.startswith("Pixtral")}
RELEASED = PixtralImages(patch_size=14, merge_size=2, longest_edge=1540)
ALL = {
    "released": RELEASED,
    "pixtral-12b": PixtralImages(patch_size=16, merge_size=1, longest_edge=1024),
    "not whole tokens": PixtralImages(patch_size=4, merge_size=2, longest_edge=52),
    "one token": PixtralImages(patch_size=4, merge_size=2, longest_edge=8),
    "less than a token": PixtralImages(patch_size=7, merge_size=2, longest_edge=5),
}
SMALL = ALL["not whole tokens"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(ALL)), st.integers(1, 5000), st.integers(1, 5000))
@example("released", 1540, 1540)
@example("released", 1541, 1)
@example("released", 100_000, 64)
@example("not whole tokens", 53, 52)
@example("less than a token", 5, 1)
def test_grids_counts_and_text_equal_hugging_face(name: str, width: int, height: int) -> None:
    ours, side = ALL[name], ALL[name].longest_edge
    picture = np.broadcast_to(np.uint8(0), (3, height, width))
    token = ours.token_size
    size = get_resize_output_image_size(picture, (side, side), (token, token), "channels_first")
    rows, columns = (length // token for length in size)
    if rows * columns == 0:
        with pytest.raises(ImageError, match="expected a shorter side of at least a pixel"):
            ours.sizes(width, height)
        return
    assert ours.token_grid(width, height) == (rows, columns)
    assert ours.sizes(width, height) == {"P": rows * columns * ours.merge_size**2, "N": rows * columns}
    layout = ours.layout(width, height)
    tokens = [["[IMG]"] * columns + ["[IMG_BREAK]"] for _ in range(rows)]  # as replace_image_token
    tokens[-1][-1] = "[IMG_END]"
    texts = [text + "[IMG]" * run for text, run in zip(layout.text, (*layout.run_lengths, 0), strict=True)]
    assert "".join(texts) == "".join(token for row in tokens for token in row)
    assert layout.positions is None


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name}-{size}") for name in PIXTRAL for size in PIXTRAL[name].sizes],
)
def test_pixels_equal_the_processor_that_hugging_face_uses_by_default(
    name: str, size: tuple[int, int], torchvision_reference: TorchvisionReference
) -> None:
    config = PIXTRAL[name].config
    ours = PixtralImages.from_preprocessor_config(
        config, patch_size=config["patch_size"]["height"] // 2, merge_size=2
    )
    theirs = torchvision_reference.theirs(name, size)
    pixels = whole_image(ours, noise_picture(*size)).numpy()
    assert theirs["image_sizes"].tolist() == [list(pixels.shape[2:])]
    np.testing.assert_allclose(
        pixels, theirs["pixel_values"], atol=0.01 * ours.rescale_factor / min(ours.image_std)
    )


def test_patches_of_a_token_follow_each_other() -> None:
    prepared = SMALL.prepare(noise_picture(24, 16))
    assert prepared["patch_positions"][:, :8].tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1, 2, 3, 2, 3]]
    assert prepared["token_index"].tolist() == list(range(6))
    assert {name: str(array.dtype) for name, array in prepared.items()} == {
        "pixel_values": "float32", "patch_positions": "int32", "num_patches": "int32", "token_index": "int32",
    }  # fmt: skip


def test_the_released_models_have_up_to_3025_tokens() -> None:
    assert [sizes["N"] for sizes in RELEASED.any_image_sizes()] == [361, 729, 1444, 3025]
    assert all(sizes["P"] == 4 * sizes["N"] for sizes in RELEASED.any_image_sizes())


def test_small_images_share_a_size() -> None:
    assert [sizes["N"] for sizes in SMALL.any_image_sizes()] == [25, 49]
    assert [sizes["N"] for sizes in ALL["one token"].any_image_sizes()] == [1]


@pytest.mark.parametrize("name", ALL)
def test_every_picture_has_room_in_the_largest_size(name: str) -> None:
    images = ALL[name]
    most = images.any_image_sizes()[-1]
    sides = [1 + images.longest_edge * eighth // 8 for eighth in range(1, 25)]
    own = [
        images.sizes(width, height) for width in sides for height in sides if width < 4 * height < 16 * width
    ]
    assert max(sizes["N"] for sizes in own) == most["N"]
    assert max(sizes["P"] for sizes in own) == most["P"]


def test_padding_is_finite_and_changes_no_patch() -> None:
    exact, own = SMALL.prepare(noise_picture(50, 20)), SMALL.sizes(50, 20)
    padded = SMALL.prepare(noise_picture(50, 20), {"P": own["P"] + 8, "N": own["N"] + 3})
    np.testing.assert_array_equal(padded["pixel_values"][: own["P"]], exact["pixel_values"])
    np.testing.assert_array_equal(padded["pixel_values"][own["P"] :], exact["pixel_values"][[0] * 8])
    assert padded["num_patches"].tolist() == [own["P"]]
    assert padded["token_index"].tolist() == [*range(own["N"]), 0, 0, 0]


@pytest.mark.parametrize("size", [(300, 200), (40, 17), (9, 120)], ids=str)
def test_a_box_shows_what_its_token_sees(size: tuple[int, int]) -> None:
    """A horizontal and a vertical ramp: a token's mean colour tells where in the picture it looks."""
    x, y = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1])
    picture = Image.fromarray((255 * np.stack([x, y, x], axis=-1)).round().astype(np.uint8))
    boxes, pixels = SMALL.layout(*size).boxes, SMALL.prepare(picture)["pixel_values"]
    colours = pixels.reshape(len(boxes), 4, 3, -1).mean(axis=(1, 3))
    levels = (colours * SMALL.image_std + SMALL.image_mean) / SMALL.rescale_factor
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / size * 255
    np.testing.assert_allclose(levels[:, :2], middle, atol=4)


def test_smaller_forms_of_an_image_lower_the_longest_edge() -> None:
    assert RELEASED.at_low().longest_edge == 770
    smaller = RELEASED.within(640, 480)
    assert smaller is not None
    assert smaller.longest_edge == 640
    assert RELEASED.within(4000, 4000) == RELEASED
    assert RELEASED.at_base() is None


def test_constants_survive_json() -> None:
    values = json.loads(json.dumps(SMALL.to_dict()))
    assert values["kind"] == "patch_rows"
    assert image_processing(values, encoder_keep=None) == SMALL


def test_a_manifest_with_encoder_reduction_is_refused() -> None:
    with pytest.raises(ManifestError, match="encoder_keep: expected none with kind 'patch_rows', got 32"):
        image_processing(SMALL.to_dict(), encoder_keep=32)


def test_missing_keys_of_a_file_are_hugging_faces_defaults() -> None:
    file = {"image_processor_type": "PixtralImageProcessorFast"}
    ours = PixtralImages.from_preprocessor_config(file, patch_size=16, merge_size=1)
    theirs = PixtralImageProcessorPil().to_dict()
    assert PixtralImages.from_preprocessor_config(theirs, patch_size=16, merge_size=1) == ours
    assert ours == ALL["pixtral-12b"]


@pytest.mark.parametrize("name", PIXTRAL)
def test_a_loaded_processor_gives_the_same_constants_as_its_file(name: str) -> None:
    config, sizes = PIXTRAL[name].config, {"patch_size": 4, "merge_size": 2}
    loaded = load_processor(config).to_dict()
    assert PixtralImages.from_preprocessor_config(loaded, **sizes) == (
        PixtralImages.from_preprocessor_config(config, **sizes)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "expected PixtralImageProcessor, got 'CLIP"),
        ({"size": {"height": 4, "width": 4}}, "size: expected a 'longest_edge' and no other, got"),
        ({"do_resize": False}, "do_resize: expected true, got false"),
        ({"do_center_crop": True}, "do_center_crop: expected false, got true"),
        ({"resample": 0}, "preprocessor_config resample: expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_preprocessor_files_that_cannot_be_followed_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PixtralImages.from_preprocessor_config(
            {**PIXTRAL["Pixtral"].config, **change}, patch_size=14, merge_size=2
        )


def test_a_picture_that_needs_more_than_the_graph_has_is_refused() -> None:
    with pytest.raises(ImageError, match="at most 4 visual tokens"):
        SMALL.prepare(noise_picture(50, 20), {"P": 100, "N": 4})
