"""Images and videos: small ones in every format, damaged; headers that promise more than there is; lists that name other files."""

from __future__ import annotations

import functools
import io
import os
import struct
import tempfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from PIL import Image

from tests.fuzz.subject import Outcome, Subject, judged
from tests.fuzz.values import NUMBERS, damaged, hostile
from tests.videos import write_video
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.images.reading import MAX_SCANS, open_image
from trio_edge.runtime.videos.qwen import Qwen3Videos, Qwen25Videos, VideoProcessing
from trio_edge.runtime.videos.reading import open_video

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
    if kind == 3:
        return _many_scans(rng)
    data = _saved(rng, (rng.choice(_SIDES), rng.choice(_SIDES)), rng.choice(_FORMATS), rng.choice(_MODES))
    return data if kind == 4 else damaged(rng, data)


def _many_scans(rng: random.Random) -> bytes:
    """Return a progressive JPEG with some scans many times, and other markers between them."""
    data = _saved(rng, (rng.choice(_SIDES), rng.choice(_SIDES)), "JPEG", "RGB", progressive=True)
    scans = data[data.find(b"\xff\xda") : -2].split(b"\xff\xda")[1:]
    between = rng.choice(
        (b"", b"", b"\xff", b"\xff\xd0", b"\xff\x02", b"\xff\xe1\0\x04ab", b"\xff\xff\xff\0")
    )
    chosen = [rng.choice(scans) for _ in range(rng.choice((1, MAX_SCANS - 9, MAX_SCANS, 5000)))]
    return data[:-2] + b"".join(between + b"\xff\xda" + scan for scan in chosen) + data[-2:]


def _saved(rng: random.Random, size: tuple[int, int], file_format: str, mode: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture = (
        Image.new("RGB", size, (200, 30, 30))
        .convert("L" if mode in ("I;16", "I", "F") else mode)
        .convert(mode)
    )
    if rng.random() < 0.1:
        options["exif"] = rng.randbytes(40)
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


# Videos

_CLIPS = (
    ("mp4", "mpeg4"), ("mp4", "libx264"), ("mov", "libx264"), ("mkv", "ffv1"), ("mkv", "mpeg4"), ("webm", "libvpx"),
    ("avi", "mpeg4"), ("avi", "rawvideo"), ("ts", "mpeg2video"), ("ts", "libx264"), ("flv", "flv"), ("mpg", "mpeg2video"),
    ("nut", "mpeg4"), ("asf", "msmpeg4"), ("ivf", "libvpx"), ("y4m", "wrapped_avframe"),
    ("h264", "libx264"),
)  # fmt: skip
_LISTS = (
    "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile {other}\n",
    "file '{other}'\n",
    "<?xml version='1.0'?><MPD><Period><BaseURL>{other}</BaseURL></Period></MPD>",
    '<?xml version="1.0"?><SmoothStreamingMedia><StreamIndex Url="{other}"/></SmoothStreamingMedia>',
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "[playlist]\nFile1={other}\n",
    "RTSPtext\nrtsp://{other}",
    "[Reference]\nRef1=file://{other}",
    "# imf\n{other}",
)
_VIDEOS = (
    VideoProcessing(Qwen25Videos(tokens_per_second=2), QwenImages(patch_size=14, window_size=112)),
    VideoProcessing(Qwen3Videos(), Qwen3Images(patch_size=14, table_size=4)),
)


def video(rng: random.Random, subject: Subject) -> Outcome:
    """A file, a folder or a list that is opened, laid out and prepared; nothing that it opened stays open."""
    source, processing = _video_source(rng, subject.folder), rng.choice(_VIDEOS)
    asked: dict[str, Any] = {}
    for name in rng.sample(("fps", "num_frames", "source_fps"), rng.choice((0, 0, 0, 1, 2))):
        asked[name] = rng.choice((2, 3.0, rng.choice(NUMBERS), 10**400, hostile(rng)))
    before = _open_files()

    def use() -> str:
        found = open_video(source, processing.sampling, max_pixels=_SMALL, **asked)
        assert len(found.frames) == len(found.indices)
        for unit, _ in enumerate(processing.layouts(found)[:2]):
            processing.prepare(found, unit)
        return "ok"

    outcome = judged(use)
    left = _open_files() - before
    return outcome if not left else Outcome("broken", f"left open: {left}")


def _open_files() -> set[tuple[str, str]]:
    """Return number and path of each open file; sockets and pipes belong to the server of the requests' kind."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own is closed by now
            target = str(link.readlink())
            if target.startswith("/") and not target.startswith("/proc/"):
                found.add((link.name, target))
    return found


def _video_source(rng: random.Random, folder: Path) -> Any:
    kind = rng.randrange(12)
    if kind == 0:
        return _frames(rng, folder)
    if kind == 1:
        for number in range(rng.choice((0, 1, 4))):
            frame = _odd_frame(
                rng, folder / f"{rng.choice(('', 'a', '9' * 30))}{number}.{rng.choice(('png', 'jpg', 'bmp'))}"
            )
            assert frame is not None
        return rng.choice((folder, str(folder)))
    path = (
        folder / f"clip.{rng.choice(('mp4', 'mkv', 'ts', 'avi', 'm3u8', 'png', 'x', 'sdp', 'mpd', 'h264'))}"
    )
    if kind == 2:
        os.mkfifo(folder / "pipe")
        (folder / "other.mp4").write_bytes(_clip(*_CLIPS[0]))
        other = rng.choice(
            (
                "pipe",
                "other.mp4",
                str(folder / "pipe"),
                "/dev/zero",
                "file:///dev/zero",
                "http://127.0.0.1:9/a.ts",
            )
        )
        path.write_text(rng.choice(_LISTS).format(other=other))
    elif kind == 3:
        _odd_frame(rng, path)
    elif kind == 4:
        path.write_bytes(
            rng.choice((rng.randbytes(rng.choice((0, 1, 30, 3000))), _saved(rng, (40, 30), "GIF", "P")))
        )
    else:
        data = _clip(*rng.choice(_CLIPS))
        path.write_bytes(data if kind == 5 else damaged(rng, data))
    return rng.choice((path, str(path)))


def _frames(rng: random.Random, folder: Path) -> Any:
    """Return a list of frames, of which one may be anything."""
    size = rng.choice(_SIDES), rng.choice(_SIDES)
    frames: list[Any] = [
        Image.new("RGB", size, (number, 0, 0)) for number in range(rng.choice((1, 2, 3, 30)))
    ]
    if rng.random() < 0.5:
        odd = (hostile(rng), _odd_frame(rng, folder / "frame.png"), _data(rng), Image.new("RGB", (3, 5)))
        frames[rng.randrange(len(frames))] = rng.choice(odd)
    return frames


def _odd_frame(rng: random.Random, path: Path) -> Path:
    """Write an image, or make a pipe, a folder or a link in its place."""
    kind = rng.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/random", path.name, "/etc/passwd")))
    else:
        path.write_bytes(_data(rng) if kind == 3 else _saved(rng, (40, 30), "PNG", "RGB"))
    return path


@functools.cache
def _clip(suffix: str, codec: str) -> bytes:
    """Return a small video; where this FFmpeg cannot write it, a Matroska."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return write_video(Path(folder) / f"clip.{suffix}", 6, codec=codec).read_bytes()
        except (av.error.FFmpegError, ValueError):
            return write_video(Path(folder) / "clip.mkv", 6).read_bytes()
