"""numpy arrays as images: the same pixels as a PNG file that holds them, in every layout in memory and for every family."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import export
from tests.runtime.images.test_qwen import PROCESSINGS
from trio_edge.runtime import Pipeline, Question, from_bgr
from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.pixtral import PixtralImages
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.images.tiles import InternVlImages, SmolVlmImages
from trio_edge.runtime.videos.qwen import Qwen25Videos
from trio_edge.runtime.videos.reading import open_video

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Array = NDArray[np.uint8]

SHAPES = {"rgb": (30, 50, 3), "rgba": (30, 50, 4), "gray": (30, 50), "one pixel": (1, 1, 3), "row": (1, 70)}


def _read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


def _in_a_larger_one(array: Array) -> Array:
    """As a camera with padded rows gives it."""
    rows, columns, *others = array.shape
    larger = np.full((rows + 3, columns + 5, *others), 77, np.uint8)
    larger[2:-1, 4:-1] = array
    return larger[2:-1, 4:-1]


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda array: array,
    "columns first": np.asfortranarray,
    "part of a larger array": _in_a_larger_one,
    "every second pixel": lambda array: np.repeat(np.repeat(array, 2, 0), 2, 1)[::2, ::2],
    "backwards": lambda array: array[::-1, ::-1].copy()[::-1, ::-1],
    "read only": _read_only,
    "a subclass": lambda array: array.view(np.recarray),
}
FAMILIES: dict[str, Any] = {
    "tiles with newlines": LlavaImages(
        kind="anyres",
        tile_size=28,
        patch_size=14,
        resize_size=28,
        grid_pinpoints=((28, 56), (56, 28), (56, 56)),
    ),
    "one crop": LlavaImages(kind="single", tile_size=28, patch_size=14, resize_size=28),
    "grid of tiles": InternVlImages(tile_size=24, tokens_per_side=3, max_tiles=6),
    "grid with text": SmolVlmImages(tile_size=24, token_size=12, longest_edge=96),
    "rows of patches": PixtralImages(patch_size=4, merge_size=2, longest_edge=44),
    **PROCESSINGS,
}


def an_array(shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


def png_of(array: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def as_bgr(array: Array) -> Array:
    """Return what OpenCV has for these pixels."""
    if array.ndim == 2:
        return array
    return np.ascontiguousarray(array[..., [2, 1, 0, 3][: array.shape[2]]])


@pytest.mark.parametrize("is_bgr", [False, True], ids=["rgb", "bgr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_array_is_read_as_the_png_that_holds_it(shape: str, layout: str, is_bgr: bool) -> None:
    array = an_array(SHAPES[shape])
    given = LAYOUTS[layout](as_bgr(array) if is_bgr else array)
    image = open_image(from_bgr(given) if is_bgr else given)
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(open_image(png_of(array))))


@pytest.mark.parametrize("is_bgr", [False, True], ids=["rgb", "bgr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["rgb", "rgba", "gray"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_prepares_it_bit_for_bit_alike(
    family: str, shape: str, layout: str, is_bgr: bool
) -> None:
    array = an_array(SHAPES[shape])
    given = LAYOUTS[layout](as_bgr(array) if is_bgr else array)
    ours = FAMILIES[family].prepare(open_image(from_bgr(given) if is_bgr else given))
    expected = FAMILIES[family].prepare(open_image(png_of(array)))
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(ours[name], tensor)


def test_the_image_is_a_copy() -> None:
    """A camera overwrites its buffer with the next frame."""
    for shape in SHAPES.values():
        array = an_array(shape)
        image = open_image(array)
        before = np.asarray(image).copy()
        array[:] = 255 - array
        np.testing.assert_array_equal(np.asarray(image), before)
        image.putpixel((0, 0), (1, 2, 3))
    assert np.shares_memory(array, from_bgr(array))  # no copy of its own


@pytest.mark.parametrize("is_bgr", [False, True], ids=["rgb", "bgr"])
@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 5, 3), np.float32),
        np.zeros((4, 5, 3), np.uint16),
        np.zeros((4, 5, 3), np.int8),
        np.zeros((4, 5), bool),
        np.zeros((4, 5), object),
        np.zeros(3, np.uint8),
        np.array(7, np.uint8),
        np.zeros((4, 5, 2), np.uint8),
        np.zeros((4, 5, 1), np.uint8),
        np.zeros((3, 40, 50), np.uint8),
        np.zeros((2, 4, 5, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_another_array_is_one_line_with_its_type_and_shape(array: Array, is_bgr: bool) -> None:
    got = f"{array.dtype} {list(array.shape)}".replace("[", r"\[").replace("]", r"\]")
    expected = (
        rf"^image: expected an array of uint8 \[H, W, 3\], \[H, W, 4\] or \[H, W\], got {got}; convert it$"
    )
    with pytest.raises(ImageError, match=expected):
        open_image(from_bgr(array) if is_bgr else array)


@pytest.mark.parametrize("shape", [(0, 5, 3), (5, 0), (0, 0, 4)])
def test_an_array_without_pixels_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ImageError, match=rf"^image: expected at least 1x1 pixels, got {shape[1]}x{shape[0]}$"
    ):
        open_image(np.zeros(shape, np.uint8))


def test_an_array_above_the_limit_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^image: expected at most 99 pixels, got 20x10;"):
        open_image(np.zeros((10, 20, 3), np.uint8), max_pixels=99)


@pytest.mark.parametrize("frame", ["frame.png", None, [[1, 2]]], ids=str)
def test_only_an_array_is_bgr(frame: Any) -> None:
    with pytest.raises(
        ImageError, match=rf"^image: expected an array of .*, got {type(frame).__name__}; conv"
    ):
        from_bgr(frame)


@pytest.mark.parametrize("is_bgr", [False, True], ids=["rgb", "bgr"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_of_arrays_is_a_video(layout: str, is_bgr: bool) -> None:
    arrays = [an_array((20, 30, 3)) + np.uint8(index) for index in range(4)]
    given = [LAYOUTS[layout](as_bgr(array) if is_bgr else array) for array in arrays]
    video = open_video(
        [from_bgr(one) for one in given] if is_bgr else given, Qwen25Videos(tokens_per_second=2)
    )
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in video.frames]), arrays)


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export("tiny", dtype="float32")) as opened:
        yield opened


FILE = Path(__file__).parents[3] / "examples" / "pictures" / "shapes-96x96.png"
ASKED = "what color is the digit 3 ?"
SAYS: dict[str, Callable[[Pipeline, Any], Any]] = {
    "generate": lambda pipeline, image: pipeline.generate(image, ASKED, max_new_tokens=4),
    "a list": lambda pipeline, image: pipeline.generate([image], ASKED, max_new_tokens=4),
    "chat": lambda pipeline, image: pipeline.chat(
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": ASKED}]}],
        max_new_tokens=4,
    ),
}


@pytest.mark.parametrize("is_bgr", [False, True], ids=["rgb", "bgr"])
@pytest.mark.parametrize("way", SAYS)
def test_answers_are_bit_for_bit_those_of_the_file(pipeline: Pipeline, way: str, is_bgr: bool) -> None:
    pixels = np.asarray(open_image(FILE))
    array = from_bgr(as_bgr(pixels)) if is_bgr else pixels
    of_array, of_file = SAYS[way](pipeline, array), SAYS[way](pipeline, FILE)
    assert of_array.text
    assert of_array.text == of_file.text
    np.testing.assert_array_equal(of_array.first_logits, of_file.first_logits)


def test_decisions_are_bit_for_bit_those_of_the_file(pipeline: Pipeline) -> None:
    question = Question.choice(ASKED, ["red", "green", "blue"])
    (of_array,) = pipeline.decide(np.asarray(open_image(FILE)), question)
    (of_file,) = pipeline.decide(FILE, question)
    assert of_array.probabilities == of_file.probabilities
    assert of_array.choice == "green"
    assert [layout.num_visual for layout in of_array.layouts] == [192]
