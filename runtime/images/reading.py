"""Reads an image from a file, bytes, a PIL image or a numpy array as upright 8-bit RGB, or raises one ImageError.

The pixels are the same as Hugging Face's, so that the exported and the original model see the same image. A path or bytes
are read like its ``load_image``: upright by the EXIF tag, then ``convert("RGB")``. A PIL image is also turned upright, then
converted like its image processors' ``do_convert_rgb``. An array gives the pixels of a PNG that holds it.

| image                                | result                                                         |
|----------------------------------------|----------------------------------------------------------------|
| with alpha, from a path, bytes, array  | alpha is dropped, the colour under it shows                    |
| with alpha, from a PIL image           | laid over white (Hugging Face makes the same difference)       |
| with one transparent colour            | laid over white                                                |
| palette, 1-bit, grayscale, CMYK, YCbCr | Pillow's conversion to RGB                                     |
| 16- or 32-bit grayscale, float         | clipped to 0..255, not scaled; a warning is logged if it shows |
| 16-bit RGB                             | the high bytes                                                 |
| several frames (GIF, TIFF, WebP)       | the first one                                                  |
"""

from __future__ import annotations

import ctypes
import io
import logging
import re
import threading
import warnings
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeAlias

    from numpy.typing import NDArray

    ImageSource: TypeAlias = str | Path | bytes | Image.Image | NDArray[np.uint8]

_HEADER_BYTES, _BYTES_PER_PIXEL = 16 << 20, 8  # no format needs more

MAX_SIDE = 1 << 17
"""Longest side in pixels. Readers need memory for each row, however short; JPEG holds half as many."""
MAX_SCANS = 100
"""Scans of a progressive JPEG, which each take the time of the whole image. Encoders write about ten; libtiff has this limit."""
_SEGMENT = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")  # in a scan, 0xff is followed by 0 or a restart marker
_START, _END, _SCAN, _FIRST_WITH_LENGTH = 0xD8, 0xD9, 0xDA, 0xC0

_A = {"image": "an image", "video": "a video"}
_MAX_LEVEL = 255
# Pillow passes EPS files to Ghostscript, which runs them as programs; the others hold files of their own, such as JPEGs.
_FORMATS_NOT_READ = frozenset({"EPS", "BLP", "IPTC"})
_logger = logging.getLogger(__name__)
_pillows_settings = threading.Lock()  # Pillow's settings and warnings.catch_warnings affect the whole process


def open_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Return the image as a loaded, upright RGB image.

    Args:
        source: A file's path, the bytes of such a file, a PIL image, or an array of uint8: [H, W, 3] RGB, [H, W, 4] RGBA or
            [H, W] grayscale; ``from_bgr`` takes OpenCV's. It is not changed, and later changes of it change nothing. No URLs.
        max_pixels: Pixels above which an image is refused before it is decoded.

    Raises:
        ImageError: If there is no such file, or it is no image, damaged, cut short, has no pixels, or has
            more than ``max_pixels``.
    """
    if isinstance(source, Image.Image):
        return _decode(source, name="image", drop_alpha=False, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        _check_array(source)
        _check_size(source.shape[1], source.shape[0], name="image", max_pixels=max_pixels)
        return Image.fromarray(np.ascontiguousarray(source)).convert("RGB")
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode_file(io.BytesIO(source), name="image", max_pixels=max_pixels)
    if not isinstance(source, (str, Path)):
        text = (
            f"image: expected a path, bytes, a PIL image or an array, got {type(source).__name__}; give one"
        )
        raise ImageError(text)
    path, name = file_of(source, kind="image"), f"image {short_name(source)}"
    try:
        with path.open("rb") as file:
            return _decode_file(file, name=name, max_pixels=max_pixels)
    except OSError as error:  # no permission
        raise ImageError(f"{name}: expected a readable file, got {one_line(error)}") from error


def from_bgr(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an array of OpenCV as ``open_image`` reads it: blue, green, red (and alpha) become a view [H, W, 3] as RGB.

    Grayscale stays as it is.

    Raises:
        ImageError: If it is no array of uint8 [H, W, 3], [H, W, 4] or [H, W].
    """
    _check_array(array)
    return array if array.ndim == 2 else array[..., 2::-1]


def _check_array(array: Any) -> None:
    is_array = isinstance(array, np.ndarray)
    if is_array and array.dtype == np.uint8 and (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
        return
    got = f"{array.dtype} {list(array.shape)}" if is_array else type(array).__name__
    raise ImageError(
        f"image: expected an array of uint8 [H, W, 3], [H, W, 4] or [H, W], got {got}; convert it"
    )


def file_of(source: str | Path, *, kind: str) -> Path:
    """Return the path of a regular file; ``kind``, "image" or "video", is for messages.

    Raises:
        ImageError: If it is a URL, missing, or no regular file.
    """
    name = f"{kind} {short_name(source)}"
    if re.match(r"[a-z0-9+]{2,}:/|data:", str(source), re.IGNORECASE):
        name = f"{kind} {short_name(re.sub(':/(?!/)', '://', str(source)))}"  # a Path has lost a slash
        raise ImageError(
            f"{name}: expected a local file, got a URL, and no address is read; download it first"
        )
    try:
        path = Path(source)
        if path.is_dir():
            raise ImageError(f"{name}: expected {_A[kind]} file, got a directory; name a file")
        if not path.exists():
            raise ImageError(f"{name}: expected an existing file, found none; check the path")
        if not path.is_file():
            raise ImageError(f"{name}: expected a regular file, got a device or pipe; copy it to a file")
    except (OSError, ValueError) as error:  # no permission; a name with a null byte or too long
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: expected a readable file, got {one_line(error)}") from error
    return path


def image_header(
    data: bytes, *, name: str = "image", max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[tuple[int, int], str | None]:
    """Return the width and height of an image file in pixels, and Pillow's name of its format, without decoding it.

    Raises:
        ImageError: If ``data`` is no image, or has more than ``max_pixels``; the message begins with ``name``.
    """
    with _opened(io.BytesIO(data), name=name, max_pixels=max_pixels) as image:
        return image.size, image.format


def _decode_file(file: IO[bytes], *, name: str, max_pixels: int) -> Image.Image:
    with _opened(file, name=name, max_pixels=max_pixels) as opened:
        return _decode(opened, name=name, drop_alpha=True, max_pixels=max_pixels)


def _opened(file: IO[bytes], *, name: str, max_pixels: int) -> Image.Image:
    """Return the image in an open file; of a refused image, little more than the header is read."""
    if (num_bytes := file.seek(0, io.SEEK_END)) == 0:
        raise ImageError(f"{name}: expected an image, got an empty file; choose another file")
    if num_bytes > (most := _HEADER_BYTES + _BYTES_PER_PIXEL * max_pixels):
        raise ImageError(
            f"{name}: expected at most {most} bytes for {max_pixels} pixels, got {num_bytes}; scale it down"
            " or raise --max-pixels"
        )
    try:
        with _pillows_limits(max_pixels):
            image = _open(file)
        num_scans = _scans(file) if image.format in ("JPEG", "MPO") else 1
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: expected an image (PNG, JPEG, WebP, …), got {num_bytes} bytes of no known format; convert it"
        ) from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged headers
        raise _refusal(error, name, max_pixels, "expected a readable image, got {}") from error
    if max(image.size) > MAX_SIDE:
        size = f"{image.width}x{image.height}"
        raise ImageError(
            f"{name}: expected sides of at most {MAX_SIDE} pixels, got {size}; cut it into parts"
        )
    if num_scans > MAX_SCANS:
        raise ImageError(f"{name}: expected at most {MAX_SCANS} scans, got more; save it as a plain JPEG")
    return image


def _scans(file: IO[bytes]) -> int:
    """Return the number of scans of the first JPEG in a file, at most one more than ``MAX_SCANS``."""
    file.seek(0)
    data, place, count = file.read(), 0, 0
    while count <= MAX_SCANS and (found := _SEGMENT.search(data, place)):
        marker, place = found[1][0], found.end()
        if marker == _END:
            break
        count += marker == _SCAN
        if marker >= _FIRST_WITH_LENGTH and marker != _START:
            place += max(int.from_bytes(data[place : place + 2], "big"), 2)
    return count


@contextmanager
def _pillows_limits(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse images that are too large, also inside of containers, without warnings."""
    with _pillows_settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, odd EXIF data, and palettes with transparency
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses images with more than twice as many pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _too_many(name: str, max_pixels: int, got: str = "more") -> ImageError:
    text = f"{name}: expected at most {max_pixels} pixels, got {got}; scale it down or raise --max-pixels"
    return ImageError(text)


def _refusal(error: Exception, name: str, max_pixels: int, otherwise: str) -> ImageError:
    """Return our error for Pillow's; ``otherwise`` says what was expected and got, unless there are too many pixels."""
    if isinstance(error, Image.DecompressionBombError):
        return _too_many(name, max_pixels)
    return ImageError(f"{name}: {otherwise.format(one_line(error))}")


def load_common_formats() -> None:
    """Import Pillow's readers for PNG, JPEG, GIF and BMP. Importing all forty takes longer than a small model's answer."""
    Image.preinit()


def _open(file: IO[bytes]) -> Image.Image:
    """Return the image before its pixels are decoded; raises Pillow's errors."""
    tried = _FORMATS_NOT_READ
    for load_formats in (load_common_formats, Image.init):
        load_formats()
        formats = [name for name in Image.OPEN if name not in tried]
        tried |= set(formats)
        file.seek(0)
        with suppress(UnidentifiedImageError):
            return Image.open(file, formats=formats)
    raise UnidentifiedImageError


def _decode(image: Image.Image, *, name: str, drop_alpha: bool, max_pixels: int) -> Image.Image:
    _check_size(*image.size, name=name, max_pixels=max_pixels)
    if image.format == "TIFF":
        _silence_libtiff()
    try:
        with _pillows_limits(max_pixels):
            image.load()
            return _rgb(_upright(image), name=name, drop_alpha=drop_alpha)
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise _refusal(
            error, name, max_pixels, "expected a whole image, got {}; the file is damaged"
        ) from error


def _check_size(width: int, height: int, *, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least 1x1 pixels, got {width}x{height}")
    if width * height > max_pixels:
        raise _too_many(name, max_pixels, f"{width}x{height}")


@cache
def _silence_libtiff() -> None:
    """Switch off libtiff's own lines on standard error; Pillow raises its errors as well."""
    with suppress(OSError, AttributeError):  # another system, or a Pillow without libtiff
        for library in set(re.findall(r"/\S*libtiff\S*", Path("/proc/self/maps").read_text())):
            ctypes.CDLL(library).TIFFSetErrorHandler(None)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data; the pixels are still good
        _logger.warning("image: its EXIF data cannot be read, so its orientation is not known")
        return image


def _rgb(image: Image.Image, *, name: str, drop_alpha: bool) -> Image.Image:
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if has_alpha and drop_alpha:
        image = image.convert("RGB")
        # A single transparent colour stays transparent, and Hugging Face's image processors see it.
        has_alpha = image.info.get("transparency") is not None
    if has_alpha:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        # Clipped without Pillow, whose releases differ in the modes they convert, and clip or shift.
        values = np.asarray(image)
        if values.max() > _MAX_LEVEL:
            text = "%s: %s values above 255 become white, as in Hugging Face; convert it to 8 bits first"
            _logger.warning(text, name, image.mode)
        return Image.fromarray(np.nan_to_num(values).clip(0, _MAX_LEVEL).astype(np.uint8)).convert("RGB")
    # A copy, so that the caller's image is never shared.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def short_name(source: object) -> str:
    """Return a source for a message: quoted, and shortened if it is long."""
    text = repr(str(source))
    return text if len(text) <= 200 else text[:120] + "…" + text[-60:]


def one_line(error: BaseException) -> str:
    """Return a library's error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
