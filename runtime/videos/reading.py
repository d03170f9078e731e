"""Reads a video from a file, a folder of frames or a list of frames; only sampled frames become RGB images.

| source                        | frames in all                          | frames per second                       |
|-------------------------------|----------------------------------------|-----------------------------------------|
| a file, through PyAV          | packets of its first video stream      | the stream's average rate               |
| a folder of images            | images in it, in natural order         | ``source_fps``, else not known          |
| a list of images              | its items                              | ``source_fps``, else not known          |

Frames are counted from the packets, not from the header, which has no count in Matroska and a wrong one in a truncated
file. Frames are upright: a phone's rotation is applied.

Source: read_video_pyav of transformers 5.23, which has the same frames and rate if the header has the count.
"""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import ImageError, install_command
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS, is_number, is_whole
from trio_edge.runtime.images.reading import file_of, one_line, open_image, short_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import ModuleType

    from trio_edge.runtime.images.reading import ImageSource

MAX_FRAMES = 4096
"""Most sampled frames: far more than a prompt has room for."""
MAX_VIDEO_PIXELS = 2**29
"""Most pixels of all sampled frames together; they take 1.5 GiB."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff"})
# Only these of FFmpeg's demuxers read a file: none of them opens the files or addresses that it names, as lists (HLS, ffconcat) do.
FORMATS = (
    "apng,asf,av1,avi,dv,flv,gif,h263,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,mxf,nut,obu,ogg,"
    "yuv4mpegpipe"
)
_SLOWEST, _FASTEST = 1e-6, 1e6  # frames per second
_HAS_LENGTH = re.compile(r"matroska|mov|avi")  # demuxers whose files contain the length; others guess it
_MISSING_AT_END = 0.5
"""Seconds by which a file may be shorter than its header says, because sound and pictures end at different times."""


class Sampling(Protocol):
    """Chooses frames."""

    def indices(
        self, total: int, video_fps: float | None, *, fps: float | None, num_frames: int | None
    ) -> Sequence[int]:
        """Return the frames to take of ``total``, ascending; a frame may come twice.

        Raises:
            ImageError: If the video cannot be sampled in this way.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Video:
    """The sampled frames of a video."""

    frames: tuple[Image.Image, ...]
    """RGB, all of one size."""
    indices: tuple[int, ...]
    """Index of each frame in the video, from 0."""
    total: int
    """Number of frames of the video."""
    fps: float | None
    """Frames per second of the video; None if not known."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].size


def open_video(
    source: str | Path | Sequence[ImageSource],
    sampling: Sampling,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    source_fps: float | None = None,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> Video:
    """Return the sampled frames of a video.

    Args:
        source: A video file, a folder of images, or a list of images.
        sampling: Chooses the frames; the bundle's.
        fps: Frames per second to sample; by default the checkpoint's.
        num_frames: Frames to sample from the whole video, instead of ``fps``.
        source_fps: Frame rate of a folder or a list, in frames per second.
        max_pixels: Pixels above which a frame is refused.

    Raises:
        ImageError: If it is no video, is damaged, truncated or too large, or cannot be sampled in this way.
    """
    for name, rate in (("fps", fps), ("source_fps", source_fps)):
        if rate is not None and not (is_number(rate) and _SLOWEST <= rate <= _FASTEST):
            raise ImageError(
                f"{name}: expected frames per second from {_SLOWEST} to {_FASTEST}, got {rate!r:.80}; choose another rate"
            )
    if num_frames is not None and not (is_whole(num_frames) and 1 <= num_frames <= MAX_FRAMES):
        raise ImageError(
            f"num_frames: expected 1..{MAX_FRAMES}, got {num_frames!r:.80}; choose another number"
        )
    if fps is not None and num_frames is not None:
        raise ImageError(f"video: expected fps or num_frames, got both ({fps} and {num_frames}); give one")

    def chosen(total: int, video_fps: float | None) -> Sequence[int]:
        indices = sampling.indices(total, video_fps, fps=fps, num_frames=num_frames)
        if len(indices) > MAX_FRAMES:
            raise ImageError(
                f"video: expected at most {MAX_FRAMES} frames, got {len(indices)}; take fewer with fps or num_frames"
            )
        return indices

    if not isinstance(source, (str, Path)):
        if not isinstance(source, (list, tuple)):
            kind = type(source).__name__
            raise ImageError(f"video: expected a path or a list of images, got {kind}; give one")
        return _from_images(source, chosen, source_fps, name="video", max_pixels=max_pixels)
    if os.path.isdir(source):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        name = f"video {short_name(source)}"
        return _from_images(images_in(Path(source)), chosen, source_fps, name=name, max_pixels=max_pixels)
    if source_fps is not None:
        raise ImageError(f"source_fps: expected none with a video file, got {source_fps}; leave it out")
    return _from_file(source, chosen, max_pixels=max_pixels)


def _from_images(
    images: Sequence[ImageSource],
    chosen: Callable[[int, float | None], Sequence[int]],
    fps: float | None,
    *,
    name: str,
    max_pixels: int,
) -> Video:
    if not images:
        raise ImageError(f"{name}: expected at least one image, got none; add frames")
    indices = chosen(len(images), fps)
    frames: dict[int, Image.Image] = {}
    for index in indices:
        if index not in frames:
            frames[index] = open_image(images[index], max_pixels=max_pixels)
            _check_size(frames[index].size, frames[indices[0]].size, num_frames=len(indices), name=name)
    return Video(
        frames=tuple(frames[index] for index in indices), indices=tuple(indices), total=len(images), fps=fps
    )


def images_in(folder: Path) -> list[Path]:
    """Return the images of a folder in natural order: 2 before 10."""
    images = (path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES and path.name[0] != ".")
    return sorted(images, key=lambda path: [_natural(part) for part in re.split(r"(\d+)", path.name)])


def _natural(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def _check_size(size: tuple[int, int], first: tuple[int, int], *, num_frames: int, name: str) -> None:
    if size != first:
        raise ImageError(
            f"{name}: expected frames of one size, got {first[0]}x{first[1]} and {size[0]}x{size[1]}; scale them alike"
        )
    width, height = size
    if num_frames * width * height > MAX_VIDEO_PIXELS:
        raise ImageError(
            f"{name}: expected at most {MAX_VIDEO_PIXELS} pixels in all frames, got {num_frames} frames of"
            f" {width}x{height}; take fewer with fps or num_frames, or scale it down"
        )


def _from_file(
    source: str | Path, chosen: Callable[[int, float | None], Sequence[int]], *, max_pixels: int
) -> Video:
    path, name = file_of(source, kind="video"), f"video {short_name(source)}"
    av = import_av()
    with _only_image_errors(name), open_container(av, path) as container:
        total = _count(container, first_stream(av, container, name=name).index, name=name)
    with _only_image_errors(name), open_container(av, path) as container:
        stream = first_stream(av, container, name=name)
        rate = stream.average_rate or stream.guessed_rate  # MPEG transport streams only have the second
        fps = float(rate) if rate and rate > 0 else None
        indices = chosen(total, fps)
        size = (stream.width, stream.height)
        if stream.width * stream.height > max_pixels:
            raise ImageError(
                f"{name}: expected frames of at most {max_pixels} pixels, got {stream.width}x{stream.height}; scale it"
                " down or raise --max-pixels"
            )
        # The size can change within a damaged stream.
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        _check_size(size, size, num_frames=len(indices), name=name)
        stream.thread_type = "AUTO"
        frames = _decoded(container.decode(stream), indices, name=name)
    return Video(
        frames=tuple(frames[index] for index in indices), indices=tuple(indices), total=total, fps=fps
    )


def import_av() -> ModuleType:
    """Return PyAV.

    Raises:
        ImageError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"video: expected PyAV to be installed, it is not; run {install_command('video')}"
        ) from error
    module: ModuleType = av
    return module


@contextmanager
def _only_image_errors(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except Exception as error:  # PyAV raises IndexError, AttributeError and others on damaged data
        told = one_line(error)
        way_out = "the file is damaged or of another kind; convert it to MP4"
        raise ImageError(f"{name}: expected a readable video, got {told}; {way_out}") from error


def open_container(av: ModuleType, path: Path) -> Any:
    """Return the container. Other files or addresses that the file names are never opened."""
    allowed = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    return av.open(f"file:{path.resolve()}", options=allowed, metadata_errors="replace")


def first_stream(av: ModuleType, container: Any, *, name: str) -> Any:
    """Return the first video stream that is not the cover image of a sound file."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise ImageError(f"{name}: expected a video, got a file without moving pictures; give a video file")


def _count(container: Any, index: int, *, name: str) -> int:
    """Return the number of frames of stream ``index`` without decoding them; raise ImageError for a truncated file."""
    count, end = 0, 0.0
    for packet in container.demux():
        if packet.size and packet.pts is not None and packet.time_base is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        count += bool(packet.size) and packet.stream_index == index
    has_length = _HAS_LENGTH.search(container.format.name)
    seconds = container.duration / 1e6 if container.duration and has_length else 0.0
    if not count or end + _MISSING_AT_END < seconds:
        raise ImageError(
            f"{name}: expected {seconds:.1f} seconds (its header), got {end:.1f} with {count} frames; the file is"
            " truncated or damaged"
        )
    return count


def _decoded(decoder: Iterator[Any], indices: Sequence[int], *, name: str) -> dict[int, Image.Image]:
    """Return the frames at ``indices`` by index; frames between them are decoded but not kept."""
    wanted, frames = set(indices), {}
    for index, frame in enumerate(decoder):
        if index in wanted:
            frames[index] = upright(frame)
            _check_size(frames[index].size, frames[indices[0]].size, num_frames=len(indices), name=name)
        if index >= indices[-1]:
            break
    if len(frames) < len(wanted):
        raise ImageError(
            f"{name}: expected {indices[-1] + 1} frames that can be decoded, got fewer; the file is damaged"
        )
    return frames


def upright(frame: Any) -> Image.Image:
    """Return PyAV's frame as an RGB image, turned as its file says."""
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # counterclockwise, as numpy's
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, quarters)) if quarters else pixels)
