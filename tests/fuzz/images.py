"""Images: small ones in every format, damaged; and headers that promise more than there is."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Any

from PIL import Image

from tests.fuzz.subject import Outcome, Subject, judged
from tests.fuzz.values import damaged
from trio_edge.runtime.images.reading import open_image

if TYPE_CHECKING:
    import random

_FORMATS = (
    "PNG",
    "JPEG",
    "GIF",
    "BMP",
    "TIFF",
    "WEBP",
    "PPM",
    "ICO",
    "TGA",
    "PCX",
    "SGI",
    "JPEG2000",
    "MPO",
    "DDS",
    "IM",
)
_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "I", "F", "YCbCr")
_SIDES = (1, 2, 3, 7, 16, 40, 100)
_SMALL = 4_000_000
"""Pixels that a fuzzed image may have: decoding more takes the time of hundreds of inputs."""


def image(rng: random.Random, subject: Subject) -> Outcome:
    """Bytes, or a file, that is opened, laid out and prepared for the vision graph."""
    data = _data(rng)
    source: Any = data
    if rng.random() < 0.3:
        source = subject.folder / f"image.{rng.choice(('png', 'jpg', 'x'))}"
        source.write_bytes(data)

    def use() -> str:
        opened = open_image(source, max_pixels=_SMALL)
        assert opened.mode == "RGB"
        images = subject.pipeline.images
        images.layout(*opened.size)
        images.prepare(opened)
        return "ok"

    return judged(use)


def _data(rng: random.Random) -> bytes:
    kind = rng.randrange(10)
    if kind == 0:
        return rng.randbytes(rng.choice((0, 1, 30, 3000)))
    if kind == 1:
        return _png(
            rng.choice((0, 1, 7, 65535, 2**31 - 1)),
            rng.choice((0, 1, 9, 65535, 2**31 - 1)),
            rng.randbytes(20),
        )
    if kind == 2:
        narrow = (1, rng.choice((1000, 30_000, 300_000)))
        return _saved(rng, narrow if rng.random() < 0.5 else narrow[::-1], "PNG", "RGB")
    data = _saved(rng, (rng.choice(_SIDES), rng.choice(_SIDES)), rng.choice(_FORMATS), rng.choice(_MODES))
    return data if kind == 3 else damaged(rng, data)


def _saved(rng: random.Random, size: tuple[int, int], file_format: str, mode: str) -> bytes:
    buffer = io.BytesIO()
    picture = (
        Image.new("RGB", size, (200, 30, 30))
        .convert("L" if mode in ("I;16", "I", "F") else mode)
        .convert(mode)
    )
    options: dict[str, Any] = {"exif": rng.randbytes(40)} if rng.random() < 0.1 else {}
    if file_format in ("GIF", "TIFF", "WEBP") and rng.random() < 0.3:
        options |= {"save_all": True, "append_images": [picture] * 3}
    if mode == "P" and rng.random() < 0.5:
        options["transparency"] = rng.randrange(300)
    try:
        picture.save(buffer, format=file_format, **options)
    except Exception:  # not every format has every mode
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, format="PNG")
    return buffer.getvalue()


def _png(width: int, height: int, data: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )
