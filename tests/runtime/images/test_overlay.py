import msgspec
import numpy as np
import pytest
from PIL import Image

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.overlay import draw_kept

PROCESSING = LlavaImages(
    kind="anyres", tile_size=28, patch_size=7, resize_size=28, grid_pinpoints=((28, 56), (56, 56))
)
PICTURE = Image.new("RGB", (64, 64), (200, 220, 240))
LAYOUT = PROCESSING.layout(64, 64)
BOXES, OVERVIEW = LAYOUT.boxes, LAYOUT.overview
NUM_BASE = PROCESSING.patches_per_tile
ORANGE = (255, 153, 0)


def _colours(drawing: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in drawing.getcolors(1 << 20)}


def test_tokens_of_the_overview_stay_its_own_after_a_selection_before_the_decoder():
    merged_last = LAYOUT.taken(np.array([1, NUM_BASE + 2, NUM_BASE + 4, 0]))
    assert list(merged_last.overview) == [0, 3]
    reduced = msgspec.structs.replace(PROCESSING, encoder_keep=2)
    assert list(reduced.layout(64, 64).kept(np.array([[2, 5]] + [[1, 3]] * 4)).overview) == [0, 1]


def test_kept_patches_stay_bright_and_the_rest_is_dark():
    first = draw_kept(PICTURE, BOXES, [np.array([NUM_BASE])], overview=OVERVIEW)
    whole = draw_kept(PICTURE, BOXES, [np.arange(NUM_BASE, len(BOXES))], overview=OVERVIEW)
    bright = [
        sum(np.all(np.asarray(drawing) == (200, 220, 240), axis=-1).ravel()) for drawing in (first, whole)
    ]
    assert bright[0] == 80 * 80  # an eighth of 640 pixels
    assert bright[1] == 640 * 640


def test_base_patches_are_outlined_and_not_brightened():
    colours = _colours(draw_kept(PICTURE, BOXES, [np.array([0, 1])], overview=OVERVIEW))
    assert ORANGE in colours
    assert (200, 220, 240) not in colours


def test_a_single_tile_has_no_base_patches():
    single = LlavaImages(kind="single", tile_size=28, patch_size=7, resize_size=28)
    layout = single.layout(64, 64)
    drawing = draw_kept(PICTURE, layout.boxes, [np.array([0, 5])], overview=layout.overview)
    assert ORANGE not in _colours(drawing)


def test_there_is_one_panel_per_stage():
    one, three = (draw_kept(PICTURE, BOXES, [np.array([20])] * n, captions=["layer 1"] * n) for n in (1, 3))
    assert three.width == 3 * (one.width - 16) + 16
    assert three.height == one.height


def test_without_a_stage_the_whole_picture_is_shown():
    assert (200, 220, 240) in _colours(draw_kept(PICTURE, BOXES, []))


@pytest.mark.parametrize("size", [(1, 1), (900, 3), (3, 900)], ids=str)
def test_pictures_of_extreme_sizes_can_be_drawn(size):
    boxes = PROCESSING.layout(*size).boxes
    assert draw_kept(Image.new("RGB", size), boxes, [np.arange(len(boxes))]).width > 100


def test_a_newline_alone_and_no_token_at_all_can_be_drawn():
    newline = np.flatnonzero(np.isnan(BOXES[:, 0]))[:1]
    assert ORANGE not in _colours(
        draw_kept(PICTURE, BOXES, [newline, np.array([], dtype=np.int64)], overview=OVERVIEW)
    )


@pytest.mark.parametrize(
    ("boxes", "kept", "captions", "message"),
    [
        (BOXES[:, :3], [], [], r"boxes: expected \[N, 4\]"),
        (BOXES, [np.array([len(BOXES)])], [], "kept: expected indices in 0.."),
        (BOXES, [np.array([-1])], [], "kept: expected indices in 0.."),
        (BOXES, [np.array([1])], ["a", "b"], "captions: expected one for each of 1 stages, got 2"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(boxes, kept, captions, message):
    with pytest.raises(ShapeError, match=message):
        draw_kept(PICTURE, boxes, kept, captions=captions)
