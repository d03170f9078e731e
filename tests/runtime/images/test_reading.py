import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from tests.hugging_face import lays_over_white
from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS
from trio_edge.runtime.images.reading import MAX_SCANS, MAX_SIDE, open_image


def _noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def _palette() -> Image.Image:
    return Image.fromarray(_noise(20, 30, 3)).quantize(16)


def _few_levels(levels: np.ndarray) -> Image.Image:
    return Image.fromarray(levels // 64 * 64)


def _rotated() -> tuple[Image.Image, dict]:
    exif = Image.Exif()
    exif[0x0112] = 6
    return Image.fromarray(_noise(20, 30, 3)), {"exif": exif}


FILES = {
    "rgb png": lambda: (Image.fromarray(_noise(20, 30, 3)), "PNG", {}),
    "rgba png": lambda: (Image.fromarray(_noise(20, 30, 4)), "PNG", {}),
    "gray with alpha": lambda: (Image.fromarray(_noise(20, 30, 2), "LA"), "PNG", {}),
    "palette": lambda: (_palette(), "PNG", {}),
    "palette with a transparent colour": lambda: (_palette(), "PNG", {"transparency": 0}),
    "gray with a transparent level": lambda: (_few_levels(_noise(20, 30)), "PNG", {"transparency": 64}),
    "rgb with a transparent colour": lambda: (
        _few_levels(_noise(20, 30, 3)),
        "PNG",
        {"transparency": (64, 0, 64)},
    ),
    "gif with a transparent colour": lambda: (_palette(), "GIF", {"transparency": 3}),
    "gray": lambda: (Image.fromarray(_noise(20, 30)), "PNG", {}),
    "1-bit": lambda: (Image.fromarray(_noise(20, 30)).convert("1"), "PNG", {}),
    "16-bit gray png": lambda: (Image.fromarray(_noise(20, 30, dtype=np.uint16)), "PNG", {}),
    "16-bit gray, dark": lambda: (Image.fromarray(_noise(20, 30).astype(np.uint16)), "PNG", {}),
    "16-bit gray tiff": lambda: (Image.fromarray(_noise(20, 30, dtype=np.uint16)), "TIFF", {}),
    "32-bit gray tiff": lambda: (Image.fromarray(_noise(20, 30, dtype=np.int32) - 2**30), "TIFF", {}),
    "float tiff": lambda: (Image.fromarray(_noise(20, 30).astype(np.float32) * 2 - 40.5), "TIFF", {}),
    "cmyk jpeg": lambda: (Image.fromarray(_noise(20, 30, 3)).convert("CMYK"), "JPEG", {}),
    "exif-rotated jpeg": lambda: (_rotated()[0], "JPEG", _rotated()[1]),
    "animated gif": lambda: (
        _palette(),
        "GIF",
        {"save_all": True, "append_images": [Image.new("P", (30, 20))]},
    ),
    "webp": lambda: (Image.fromarray(_noise(20, 30, 3)), "WEBP", {}),
}


def _png(width: int, height: int) -> bytes:
    """A PNG whose header claims any size, with no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@lays_over_white
@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_the_pixels_that_hugging_face_makes_of_it(name, tmp_path):
    """``load_image`` first, then what every image processor does."""
    picture, file_format, options = FILES[name]()
    path = tmp_path / "picture"
    picture.save(path, format=file_format, **options)

    ours = open_image(path)

    assert ours.mode == "RGB"
    with Image.open(path) as opened:  # load_image leaves the file of a path open
        expected = convert_to_rgb(load_image(opened), return_numpy=True)
        np.testing.assert_allclose(np.asarray(ours, int), expected.astype(int), atol=1)
    np.testing.assert_array_equal(np.asarray(open_image(path.read_bytes())), np.asarray(ours))


@lays_over_white
@pytest.mark.parametrize("name", [name for name in FILES if "exif" not in name])
def test_a_pil_image_gives_the_pixels_of_hugging_face_image_processors(name, tmp_path):
    picture, file_format, options = FILES[name]()
    picture.save(tmp_path / "picture", format=file_format, **options)
    with Image.open(tmp_path / "picture") as opened:
        expected = convert_to_rgb(opened, return_numpy=True)
        np.testing.assert_allclose(np.asarray(open_image(opened), int), expected.astype(int), atol=1)


def test_a_rotated_picture_is_turned_upright():
    picture, options = _rotated()
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", **options)
    assert picture.size == (30, 20)
    assert open_image(buffer.getvalue()).size == (20, 30)


def test_transparency_from_a_file_is_dropped_and_from_a_pil_image_laid_over_white():
    clear_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    buffer = io.BytesIO()
    clear_red.save(buffer, format="PNG")
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(clear_red).getpixel((0, 0)) == (255, 255, 255)


def test_one_transparent_colour_of_a_file_is_laid_over_white():
    picture = Image.new("P", (2, 2), 1)
    picture.putpalette([9, 9, 9, 200, 0, 0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", transparency=1)
    assert open_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_clipping_a_16_bit_picture_is_logged(caplog):
    with caplog.at_level(logging.WARNING):
        open_image(Image.fromarray(np.full((2, 2), 4000, np.uint16)))
    assert "values above 255 become white" in caplog.text


def test_the_callers_pil_image_is_not_changed():
    picture = Image.new("RGB", (2, 2))
    open_image(picture).putpixel((0, 0), (9, 9, 9))
    assert picture.getpixel((0, 0)) == (0, 0, 0)


def test_unreadable_exif_data_leaves_the_pixels(tmp_path):
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00nonsense")
    assert open_image(tmp_path / "a.jpg").size == (4, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected an image, got an empty file"),
        (b"hello, I am text", "no known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no known format"),
        (b"\x89PNG\r\n\x1a\n", "no known format"),
        (_png(10, 10), "expected a whole image"),
        (_png(0, 10), "expected "),
        (_png(100_000, 100_000), f"expected at most {MAX_IMAGE_PIXELS} pixels"),
        (_png(17_000, 12_000), f"expected at most {MAX_IMAGE_PIXELS} pixels"),
    ],
    ids=[
        "empty",
        "text",
        "eps",
        "header only",
        "no pixels stored",
        "zero width",
        "bomb",
        "slightly too large",
    ],
)
def test_bytes_that_are_no_picture_are_refused_in_one_line(content, message):
    with pytest.raises(ImageError, match=message) as caught:
        open_image(content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_file_cut_short_is_refused(file_format):
    buffer = io.BytesIO()
    Image.fromarray(_noise(64, 64, 3)).save(buffer, format=file_format)
    with pytest.raises(ImageError, match=r"expected a (whole|readable) image|no known format"):
        open_image(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def test_a_large_picture_below_the_limit_passes_pillows_size_warning():
    with pytest.raises(ImageError, match="expected a whole image"):  # not a DecompressionBombWarning
        open_image(_png(8_000, 8_000))


def test_the_limit_can_be_raised_and_lowered():
    with pytest.raises(ImageError, match="expected a whole image"):
        open_image(_png(20_000, 20_000), max_pixels=400_000_000)
    with pytest.raises(
        ImageError, match=r"expected at most 99 pixels, got more; scale it down or raise --max-pixels"
    ):
        open_image(_png(10, 10), max_pixels=99)
    with pytest.raises(ImageError, match=r"expected at most 99 pixels, got 10x10"):
        open_image(Image.new("RGB", (10, 10)), max_pixels=99)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ImageError, match=r"huge.png': expected at most \d+ bytes for 67108864 pixels, got 1099511627776"
    ):
        open_image(tmp_path / "huge.png")


def _scanned(count: int) -> bytes:
    """Return a JPEG in which its last scan comes so often that there are ``count``, ten of them its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 50, 200)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * (count - 10) + data[-2:]


def test_a_jpeg_has_at_most_100_scans(tmp_path):
    assert open_image(_scanned(MAX_SCANS)).size == (40, 30)
    (tmp_path / "many.jpg").write_bytes(_scanned(MAX_SCANS + 1))
    with pytest.raises(ImageError, match=r"many.jpg': expected at most 100 scans, got more; save it as"):
        open_image(tmp_path / "many.jpg")


@pytest.mark.parametrize("hidden", [b"\xff\x02", b"\xff\xd0", b"\xff\xff\xff", b"\xff\xbf\xff\xff"])
def test_scans_are_not_hidden_by_markers_that_libjpeg_passes_over(hidden):
    data = _scanned(10)
    last = data[data.rfind(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="expected at most 100 scans"):
        open_image(data[:-2] + (hidden + last) * 100 + data[-2:])


def test_what_only_looks_like_a_scan_does_not_count():
    buffer = io.BytesIO()
    exif = b"Exif\0\0" + b"\xff\xda" * 500
    Image.fromarray(_noise(40, 30, 3)).save(buffer, "JPEG", quality=95, exif=exif)
    assert open_image(buffer.getvalue()[:-2] + b"\xff" * 1_000_000 + b"\0\xff\xd9").size == (30, 40)
    assert open_image(buffer.getvalue() + b"a film after it" + b"\xff\xda" * 500).size == (30, 40)


@pytest.mark.parametrize("file_format", ["BLP", "IPTC"])
def test_formats_that_hold_other_files_are_not_read(file_format):
    Image.init()
    assert file_format in Image.OPEN
    start = {"BLP": b"BLP1" + bytes(200), "IPTC": b"\x1c\x03\x3c\x00\x02\x01\x00\x1c\x08\x0a\x00\x00"}[
        file_format
    ]
    with pytest.raises(ImageError, match="no known format"):
        open_image(start)


def test_a_side_that_needs_much_memory_for_its_rows_is_refused_before_decoding():
    with pytest.raises(
        ImageError, match="expected sides of at most 131072 pixels, got 1x50000000; cut it into"
    ):
        open_image(_png(1, 50_000_000))
    with pytest.raises(ImageError, match="expected a whole image"):
        open_image(_png(1, MAX_SIDE))


def test_an_icon_with_a_larger_image_inside_is_refused():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="ICO", sizes=[(64, 64)])
    with pytest.raises(ImageError, match="expected at most"):
        open_image(buffer.getvalue(), max_pixels=1000)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.png", "expected an existing file"),
        (".", "got a directory"),
        ("/dev/null", "expected a regular file"),
        ("a\0b.png", "expected "),
        ("x" * 5000, "expected "),
        ("https://example.org/a.png", "download it first"),
        (12, "got int"),
    ],
    ids=["missing", "directory", "device", "null byte", "long name", "url", "number"],
)
def test_a_source_that_is_no_file_is_refused_in_one_line(source, message):
    with pytest.raises(ImageError, match=message) as caught:
        open_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_pil_image_without_pixels_is_refused():
    with pytest.raises(ImageError, match="expected at least 1x1 pixels, got 0x5"):
        open_image(Image.new("RGB", (0, 5)))
