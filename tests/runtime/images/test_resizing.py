import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.images import resizing as image_resize
from trio_edge.runtime.images.resizing import resize


def _picture(width: int, height: int, *, binary: bool = False) -> Image.Image:
    pixels = np.random.default_rng(width * 7 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(pixels > 127, 255, 0).astype(np.uint8) if binary else pixels)


def _by_torch(picture: Image.Image, size: tuple[int, int], resample: str) -> np.ndarray:
    """torchvision 0.28 calls just this for uint8 on the CPU: compared with its ``resize`` on 500 random cases."""
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    resized = torch.nn.functional.interpolate(tensor[None], size=size, mode=resample, antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


@settings(max_examples=25, deadline=None)
@given(
    *[st.integers(1, 150)] * 4,
    st.sampled_from(["bicubic", "bilinear", "lanczos"]),
    st.booleans(),
)
def test_resizing_equals_torchs_uint8_kernel_which_torchvision_calls(
    width, height, new_width, new_height, resample, binary
):
    picture, size = _picture(width, height, binary=binary), (new_height, new_width)
    ours, theirs = resize(picture, size, resample=resample), _by_torch(picture, size, resample)
    np.testing.assert_array_equal(ours, theirs)


def test_a_crop_is_the_middle_of_the_whole():
    picture = _picture(60, 31)
    whole = resize(picture, (100, 193), resample="bicubic")
    part = resize(picture, (100, 193), resample="bicubic", crop=(3, 50, 40, 70))
    np.testing.assert_array_equal(part, whole[3:43, 50:120])


def test_a_crop_of_a_huge_enlargement_needs_no_huge_memory():
    crop = (0, 671_832, 336, 336)
    assert resize(_picture(4000, 1), (336, 1_344_000), resample="bicubic", crop=crop).shape == (336, 336, 3)


def test_the_largest_square_of_smolvlm_is_resized_exactly():
    picture = _picture(2048, 2048)
    ours, theirs = resize(picture, (64, 64), resample="lanczos"), _by_torch(picture, (64, 64), "lanczos")
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
@pytest.mark.parametrize("crop", [None, (5, 10, 20, 30)], ids=["whole", "crop"])
def test_the_faster_way_for_large_pictures_is_within_one_level(crop, resample, monkeypatch):
    picture = _picture(400, 300)
    exact = resize(picture, (60, 80), resample=resample, crop=crop)
    monkeypatch.setattr(image_resize, "MAX_EXACT_PIXELS", 0)
    fast = resize(picture, (60, 80), resample=resample, crop=crop)
    np.testing.assert_allclose(fast.astype(int), exact.astype(int), atol=1)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (2, 1_000_000), (1, 20_000_000)])
def test_an_image_so_narrow_that_it_would_take_gigabytes_is_refused(size):
    width, height = size
    scaled = (336 * height, 336) if height > width else (336, 336 * width)
    with pytest.raises(ImageError, match=f"got {width}x{height}; crop the image so that it is less narrow"):
        resize(Image.new("RGB", size), scaled, resample="bicubic", crop=(0, 0, 336, 336))


def test_a_narrow_image_is_resized_in_parts_as_at_once(monkeypatch):
    picture = _picture(7, 5000)
    whole = resize(picture, (90, 300), resample="bicubic")
    monkeypatch.setattr(image_resize, "_MOST_SUMS", 4096)
    np.testing.assert_array_equal(resize(picture, (90, 300), resample="bicubic"), whole)
