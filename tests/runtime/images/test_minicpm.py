"""MiniCPM-V's slices: the same grids, numbers and texts as Hugging Face's processor, and boxes that follow the pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.vision_utils import get_vision_nearest_position_ids

from tests.pictures import noise_picture
from tests.torchvision_reference import PROCESSORS, TorchvisionReference
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.images.minicpm import MiniCpmImages

MINICPM = {name: entry for name, entry in PROCESSORS.items() if name.startswith("MiniCPM")}
SMALL = MiniCpmImages(tile_size=36, patch_size=3, max_tiles=4, table_side=7)


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(name, size, id=f"{name}-{size}") for name in MINICPM for size in MINICPM[name].sizes],
)
def test_patches_and_places_equal_the_processor_of_hugging_face(
    name: str, size: tuple[int, int], torchvision_reference: TorchvisionReference
) -> None:
    """The original's patches are in one row, [1, 3, side, patches x side], slice after slice and line by line."""
    ours = MiniCpmImages.from_preprocessor_config(MINICPM[name].config, table_side=70)
    theirs = torchvision_reference.theirs(name, size)
    made, side, grids = ours.prepare(noise_picture(*size)), ours.patch_size, theirs["target_sizes"]
    patches = (
        theirs["pixel_values"][0].reshape(3, side, -1, side).transpose(2, 0, 1, 3).reshape(-1, 3 * side**2)
    )
    places, start = get_vision_nearest_position_ids(torch.from_numpy(grids), 70).numpy(), 0
    assert made["num_patches"].tolist() == grids.prod(-1).tolist()
    for number, (tall, wide) in enumerate(grids.tolist()):
        order = start + ours._order(tall, wide)
        np.testing.assert_array_equal(made["pixel_values"][number, : tall * wide], patches[order])
        np.testing.assert_array_equal(made["table_index"][number, : tall * wide], places[order])
        assert not made["pixel_values"][number, tall * wide :].any()
        start += tall * wide
    assert len(made["token_index"]) == ours.sizes(*size)["N"] == len(patches) // ours.merge_size**2
    assert image_processing(ours.to_dict(), encoder_keep=None) == ours


@pytest.mark.parametrize("size", [(60, 45), (24, 24), (130, 31), (31, 130), (100, 99)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_boxes_are_where_a_tokens_pixels_come_from(size: tuple[int, int], axis: int) -> None:
    """The mean of a colour ramp in a token's patches tells its place."""
    ramp = np.linspace(0, 255, size[axis])
    levels = np.broadcast_to(ramp[None, :, None] if axis == 0 else ramp[:, None, None], (*size[::-1], 3))
    made = SMALL.prepare(Image.fromarray(levels.astype(np.uint8)))
    means = made["pixel_values"].reshape(-1, 16 * made["pixel_values"].shape[-1]).mean(-1)
    places = (means[made["token_index"]] + 1) / 2 * size[axis]
    boxes = SMALL.layout(*size).boxes
    centers = (boxes[:, axis] + boxes[:, axis + 2]) / 2
    np.testing.assert_allclose(places, centers, atol=0.04 * size[axis])


def test_text_marks_the_overview_and_rows_of_slices() -> None:
    layout = SMALL.layout(72, 71)
    assert SMALL.grid(72, 71) == (2, 2)
    between = "</slice><slice>", "</slice>\n<slice>", "</slice><slice>"
    assert layout.text == ("<image>", "</image><slice>", *between, "</slice>")
    assert layout.number_marks == ("<image_id>", "</image_id>")
    assert layout.run_lengths == (9,) * 5
    assert list(layout.overview) == list(range(9))
    alone = SMALL.layout(24, 24)
    assert alone.text == ("<image>", "</image>")
    assert list(alone.overview) == []


def test_forms_of_levels_have_fewer_slices() -> None:
    base = SMALL.at_base()
    assert base is not None
    assert base.sizes(72, 72) == {"B": 1, "N": 9}
    assert base.at_base() is None
    for side, count in ((36, 1), (37, 3), (72, 5)):
        within = SMALL.within(side, 72 if side > 36 else 36)
        assert within is not None
        assert within.sizes(144, 144)["B"] == count


def test_a_slice_that_is_too_long_is_refused() -> None:
    with pytest.raises(
        ImageError, match=r"at most 12 visual tokens in a slice, got 25x1 for 1000x10 pixels; crop it"
    ):
        SMALL.sizes(1000, 10)


def test_every_other_image_fits_the_largest_sizes() -> None:
    largest = SMALL.any_image_sizes()[-1]
    for width in range(8, 200, 7):
        for height in range(max(8, width // 5), 200, 9):
            if height > 5 * width:
                continue
            sizes = SMALL.sizes(width, height)
            assert sizes["B"] <= largest["B"]
            assert sizes["N"] <= largest["N"]


def test_a_way_of_merging_that_is_unknown_is_refused() -> None:
    config = {"image_processor_type": "MiniCPMV4_6ImageProcessor", "downsample_mode": "8x"}
    with pytest.raises(CheckpointError, match="downsample_mode: expected 16x or 4x, got '8x'"):
        MiniCpmImages.from_preprocessor_config(config, table_side=7)


@pytest.mark.parametrize("kind", ["grid_tiles", "naflex_tiles", "sliced_image"])
def test_a_bundle_with_more_tiles_than_can_be_listed_is_refused(kind: str) -> None:
    """Without the bound, a number in a bundle's manifest would fill the memory."""
    own = {"grid_tiles": {"tile_size": 24, "tokens_per_side": 3}, "sliced_image": {"table_side": 7}}
    values = {"kind": kind, **own.get(kind, {})}
    assert (
        image_processing({**values, "max_tiles": 4096}, encoder_keep=None).any_image_sizes()[-1]["B"] == 4097
    )
    with pytest.raises(ManifestError, match=r"image_processing: Expected `int` <= 4096 - at `\$.max_tiles`"):
        image_processing({**values, "max_tiles": 4097}, encoder_keep=None)
