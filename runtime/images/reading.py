"""Reading an image: from a file, bytes or a PIL image to upright 8-bit RGB, or one ImageError.

The result is what Hugging Face makes of the same argument, so that exported and original model see the same
pixels. Of a path or bytes, like its ``load_image``: upright by the EXIF tag, then ``convert("RGB")``. Of a
PIL image, upright too, then like its image processors' ``do_convert_rgb``.

| image                                | result                                                         |
|----------------------------------------|----------------------------------------------------------------|
| with alpha, from a path or bytes       | alpha is dropped, the colour under it shows                    |
| with alpha, from a PIL image           | laid over white (Hugging Face makes the same difference)       |
| with one transparent colour            | laid over white                                                |
| palette, 1-bit, grayscale, CMYK, YCbCr | Pillow's conversion to RGB                                     |
| 16- or 32-bit grayscale, float         | clipped to 0..255, not scaled; a warning is logged if it shows |
| 16-bit RGB                             | the high bytes                                                 |
| several frames (GIF, TIFF, WebP)       | the first one                                                  |
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Set
    from typing import TypeAlias

    ImageSource: TypeAlias = str | Path | bytes | Image.Image

_HEADER_BYTES, _BYTES_PER_PIXEL = (
    16 << 20,
    8,
)  # no format needs more for what it holds besides pixels, and for one of them

_A = {"image": "an image", "video": "a video"}
_MAX_LEVEL = 255
_FORMATS_NOT_READ = frozenset({"EPS"})  # Pillow hands EPS files to Ghostscript, which runs them as programs
_logger = logging.getLogger(__name__)
_pillows_settings = threading.Lock()  # they, and warnings.catch_warnings, are the whole process's


def open_image(source: ImageSource, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Return the image as a loaded, upright RGB image.

    Args:
        source: A file's path, the bytes of such a file, or a PIL image, which is not changed. No URLs.
        max_pixels: Pixels above which an image is refused before it is decoded.

    Raises:
        ImageError: If there is no such file, or it is no image, damaged, cut short, has no pixels, or has
            more than ``max_pixels``.
    """
    if isinstance(source, Image.Image):
        return _decode(source, name="image", drop_alpha=False, max_pixels=max_pixels)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        return _decode_file(io.BytesIO(data), len(data), name="image", max_pixels=max_pixels)
    if isinstance(source, (str, Path)):
        return _decode_path(source, max_pixels=max_pixels)
    raise ImageError(f"image: expected a path, bytes or a PIL image, got {type(source).__name__}")


def _decode_path(source: str | Path, *, max_pixels: int) -> Image.Image:
    path, name = file_of(source, kind="image"), f"image {short_name(source)}"
    try:
        with path.open("rb") as file:
            return _decode_file(file, os.fstat(file.fileno()).st_size, name=name, max_pixels=max_pixels)
    except OSError as error:  # no permission
        raise ImageError(f"{name}: expected a readable file, got {one_line(error)}") from error


def file_of(source: str | Path, *, kind: str) -> Path:
    """Return the path of a regular file.

    Args:
        source: Its name.
        kind: "image" or "video", for messages.

    Raises:
        ImageError: If it is a URL, missing, or no regular file.
    """
    name = f"{kind} {short_name(source)}"
    if isinstance(source, str) and re.match(r"[a-z0-9+]{2,}://|data:", source):
        raise ImageError(f"{name}: expected a local file, got a URL; download it first")
    try:
        path = Path(source)
        if path.is_dir():
            raise ImageError(f"{name}: expected {_A[kind]} file, got a directory")
        if not path.exists():
            raise ImageError(f"{name}: expected an existing file, found none; check the path")
        if not path.is_file():
            raise ImageError(f"{name}: expected a regular file, got a device or pipe")
    except (OSError, ValueError) as error:  # no permission; a name with a null byte or too long
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name}: expected a readable file, got {one_line(error)}") from error
    return path


def image_header(
    data: bytes, *, name: str = "image", max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[tuple[int, int], str | None]:
    """Return width and height in pixels, and Pillow's name of the format; nothing is decoded.

    Args:
        data: The bytes of a file.
        name: For messages.
        max_pixels: Pixels above which an image is refused.

    Raises:
        ImageError: If it is no image, or has more than ``max_pixels``.
    """
    with _opened(io.BytesIO(data), len(data), name=name, max_pixels=max_pixels) as image:
        return image.size, image.format


def _decode_file(file: IO[bytes], num_bytes: int, *, name: str, max_pixels: int) -> Image.Image:
    with _opened(file, num_bytes, name=name, max_pixels=max_pixels) as opened:
        return _decode(opened, name=name, drop_alpha=True, max_pixels=max_pixels)


def _opened(file: IO[bytes], num_bytes: int, *, name: str, max_pixels: int) -> Image.Image:
    """Return the image in a file that is open; of one that is refused, little more than the header is read."""
    if num_bytes == 0:
        raise ImageError(f"{name}: expected an image, got an empty file")
    if num_bytes > (most := _HEADER_BYTES + _BYTES_PER_PIXEL * max_pixels):
        raise ImageError(
            f"{name}: expected at most {most} bytes for {max_pixels} pixels, got {num_bytes}; scale it down"
            " or raise --max-pixels"
        )
    try:
        with _pillows_limits(max_pixels):
            return _open(file)
    except Image.DecompressionBombError as error:
        raise ImageError(_too_many(name, max_pixels)) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: expected an image (PNG, JPEG, WebP, …), got {num_bytes} bytes of no known format"
        ) from error
    except Exception as error:  # Pillow's readers raise almost anything on damaged headers
        raise ImageError(f"{name}: expected a readable image, got {one_line(error)}") from error


@contextmanager
def _pillows_limits(max_pixels: int) -> Iterator[None]:
    """Let Pillow refuse what is too large, also inside of containers, and keep its warnings to itself."""
    with _pillows_settings, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on sizes, odd EXIF data, and palettes with transparency
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = max_pixels // 2  # Pillow refuses what has more than twice as many
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _too_many(name: str, max_pixels: int, got: str = "more") -> str:
    return f"{name}: expected at most {max_pixels} pixels, got {got}; scale it down or raise --max-pixels"


def load_common_formats() -> None:
    """Import Pillow's readers of PNG, JPEG, GIF and BMP. All forty take longer than an answer of a small model."""
    Image.preinit()


def _open(file: IO[bytes]) -> Image.Image:
    """Return the image before its pixels are decoded; raise what Pillow raises."""
    load_common_formats()
    try:
        return _open_as(set(Image.OPEN), file)
    except UnidentifiedImageError:
        common = set(Image.OPEN)
        Image.init()
        return _open_as(set(Image.OPEN) - common, file)


def _open_as(formats: Set[str], file: IO[bytes]) -> Image.Image:
    wanted = [name for name in Image.OPEN if name in formats and name not in _FORMATS_NOT_READ]
    file.seek(0)
    return Image.open(file, formats=wanted)


def _decode(image: Image.Image, *, name: str, drop_alpha: bool, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: expected at least 1x1 pixels, got {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(_too_many(name, max_pixels, f"{width}x{height}"))
    try:
        with _pillows_limits(max_pixels):
            image.load()
            return _rgb(_upright(image), name=name, drop_alpha=drop_alpha)
    except Image.DecompressionBombError as error:
        raise ImageError(_too_many(name, max_pixels)) from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged data
        raise ImageError(
            f"{name}: expected a whole image, got {one_line(error)}; the file is damaged"
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF data: the pixels are still good
        _logger.warning("image: its EXIF data cannot be read, so its orientation is not known")
        return image


def _rgb(image: Image.Image, *, name: str, drop_alpha: bool) -> Image.Image:
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if has_alpha and drop_alpha:
        image = image.convert("RGB")
        # a single transparent colour is still one, and Hugging Face's image processors see it
        has_alpha = image.info.get("transparency") is not None
    if has_alpha:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (255, 255, 255, 255)), over).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return _rgb_from_wide(image, name=name)
    # copy: convert returns the very same pixels for an image that is RGB already
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _rgb_from_wide(image: Image.Image, *, name: str) -> Image.Image:
    """Clip to 0..255 here: whether Pillow can convert the mode, and shifts or clips, differs by release."""
    values = np.asarray(image)
    if values.max() > _MAX_LEVEL:
        _logger.warning(
            "%s: %s values above 255 become white, as in Hugging Face; convert it to 8 bits first",
            name,
            image.mode,
        )
    return Image.fromarray(np.nan_to_num(values).clip(0, _MAX_LEVEL).astype(np.uint8)).convert("RGB")


def short_name(source: object) -> str:
    """Return a source for a message: quoted, and cut if it is long."""
    text = repr(str(source))
    return text if len(text) <= 200 else text[:120] + "…" + text[-60:]


def one_line(error: BaseException) -> str:
    """Return an error of a library as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
