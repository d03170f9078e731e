"""Frames as they come: from a camera, a stream, a video file or a folder of images.

| source                                 | frames                                               |
|----------------------------------------|------------------------------------------------------|
| a camera's number, or /dev/video0      | the newest one; opened again when the camera is lost |
| rtsp://, rtsps://, http:// or https:// | the newest one; likewise                             |
| a video file, a folder of images       | every one, in order                                  |
| a video file with ``live``             | the newest one, at the file's own speed              |
| a folder of images with ``live``       | the newest image, and each that is written later     |

PyAV reads cameras and streams too: it already reads video files here, and FFmpeg's V4L2 and RTSP are in its wheel. A device or
an address is opened only if it is the source itself, never because a file names it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS
from trio_edge.runtime.images.reading import file_of, one_line, open_image, short_name
from trio_edge.runtime.videos import reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from PIL import Image

SECONDS_WITHOUT_DATA = 10.0
"""A camera or stream that gives nothing for so long counts as lost."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before a lost camera is opened again; each wait is twice the last one."""
_SECONDS_TO_LOOK = 0.5  # into a folder
_SECONDS_TO_CLOSE = 1.0
_OPTIONS = {
    "http": {
        "protocol_whitelist": "http,https,tls,tcp",
        "format_whitelist": f"{reading.FORMATS},mpjpeg",
    },
    "rtsp": {
        "protocol_whitelist": "rtsp,rtsps,rtp,udp,tcp,tls",
        "format_whitelist": "rtsp",
        "rtsp_transport": "tcp",  # UDP loses packets on a busy network, and FFmpeg then shows gray blocks
    },
}
_Item = TypeVar("_Item")


class Frame(NamedTuple):
    """A frame that is converted to an RGB image only if somebody looks at it."""

    number: int
    """From 0; skipped frames count."""
    time: float
    """Seconds since 1970 when it was read."""
    source: str
    """The source without user and password; of a folder, the image's path."""
    image: Callable[[], Image.Image]


def read_frames(
    source: str,
    *,
    live: bool = False,
    note: Callable[[str], None] = lambda _text: None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Frame]:
    """Return the frames of a source, which is opened at the first one.

    A camera that gave a frame and is lost is opened again, after growing waits; iterating goes on when it is back.

    Args:
        source: See the module.
        live: Take only the newest frame of a file or folder, too.
        note: Called with one line when a camera is lost, and when it is back.
        check: Called twice a second while no frame comes; what it raises ends the iteration.

    Raises:
        ImageError: If it is missing; and while iterating, if it cannot be opened, or a file is damaged.
    """
    closed = threading.Event()
    place = f"/dev/video{source}" if re.fullmatch(r"\d{1,3}", source) else source
    address = re.match("(http|rtsp)s?://", place, re.IGNORECASE)
    if address or re.match("/dev/(?!shm/)", place):
        options = _OPTIONS[address[1].lower()] if address else {}
        return _newest(_camera(place, options, closed, note), closed, check)
    if os.path.isdir(place):  # noqa: PTH112  # Path.is_dir raises for a name that is too long
        frames = _written_images(Path(place), closed) if live else _images(Path(place))
    else:
        frames = _pictures(str(file_of(place, kind="video")), pace=closed if live else None)
    return _newest(frames, closed, check) if live else frames


def put_newest(waiting: Queue[_Item], item: _Item) -> None:
    """Put ``item`` into a queue for one, in place of an item that nobody took. For one putting thread."""
    with suppress(Empty):
        waiting.get_nowait()
    waiting.put(item)


def _newest(frames: Iterator[Frame], closed: threading.Event, check: Callable[[], None]) -> Iterator[Frame]:
    """Yield the newest of ``frames``, which a thread reads."""
    waiting: Queue[Frame | Exception | None] = Queue(1)
    thread = threading.Thread(target=_read, args=(frames, waiting, closed), name="frames", daemon=True)
    thread.start()
    try:
        while (item := _next(waiting, check)) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        closed.set()
        with suppress(Empty):
            waiting.get_nowait()
        thread.join(_SECONDS_TO_CLOSE)  # a thread that still waits for a frame ends with the program


def _next(waiting: Queue[_Item], check: Callable[[], None]) -> _Item:
    """Return what is put next. A Ctrl-C that Python dropped in a finalizer would be waited over without ``check``."""
    while True:
        with suppress(Empty):
            return waiting.get(timeout=_SECONDS_TO_LOOK)
        check()


def _read(frames: Iterator[Frame], waiting: Queue[Frame | Exception | None], closed: threading.Event) -> None:
    end = None
    try:
        for frame in frames:
            put_newest(waiting, frame)
            if closed.is_set():
                return
    except Exception as error:  # raised again where the frames are taken
        end = error
    waiting.put(end)


def _images(folder: Path) -> Iterator[Frame]:
    if not (paths := reading.images_in(folder)):
        raise ImageError(f"source {short_name(folder)}: expected images, got none; name another folder")
    for number, path in enumerate(paths):
        yield Frame(number, time.time(), str(path), partial(open_image, path))


def _written_images(folder: Path, closed: threading.Event) -> Iterator[Frame]:
    """Yield the newest image of a folder whenever it is another one, and whole."""
    number, last = 0, (0, "")
    while not closed.wait(_SECONDS_TO_LOOK if number else 0.0):
        with suppress(ImageError, OSError):  # half written: it is looked at again; or deleted
            times = [(path.stat().st_mtime_ns, str(path)) for path in reading.images_in(folder)]
            if times and (newest := max(times)) != last:
                image = open_image(newest[1])
                yield Frame(number, time.time(), newest[1], image.copy)
                number, last = number + 1, newest


def _camera(
    place: str, options: dict[str, str], closed: threading.Event, note: Callable[[str], None]
) -> Iterator[Frame]:
    number, wait, is_lost = 0, FIRST_WAIT, False
    while not closed.is_set():
        told = f"source {short_name(_name(place))}: ended"
        try:
            for frame in _pictures(place, options):
                if is_lost:
                    note(f"source {short_name(frame.source)}: is back")
                yield frame._replace(number=number)
                number, wait, is_lost = number + 1, FIRST_WAIT, False
        except ImageError as error:
            if number == 0:
                raise
            told = str(error)
        if not is_lost:
            note(f"{told}; opening it again until it is back")
        is_lost = True
        closed.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def _pictures(
    place: str, options: dict[str, str] | None = None, *, pace: threading.Event | None = None
) -> Iterator[Frame]:
    """Yield what PyAV reads: with ``options`` from a camera, with ``pace`` each frame at its time."""
    av, name, number, start = reading.import_av(), _name(place), 0, None
    # A stream that is joined late begins with what cannot be decoded.
    skipped = () if options is None else (av.error.InvalidDataError,)
    patience = (SECONDS_WITHOUT_DATA, SECONDS_WITHOUT_DATA)
    try:
        if options is None:
            container = reading.open_container(av, Path(place))
        else:
            container = av.open(place, format=None if options else "v4l2", options=options, timeout=patience)
        with container:
            stream = reading.first_stream(av, container, name=name)
            stream.codec_context.options = {"max_pixels": str(MAX_IMAGE_PIXELS)}
            # Threads with a frame each hold back as many frames; threads that share a frame none.
            stream.thread_type = "AUTO" if options is None else "SLICE"
            for packet in container.demux(stream):
                with suppress(*skipped):
                    for picture in packet.decode():
                        if pace is not None:
                            start = time.monotonic() - (picture.time or 0.0) if start is None else start
                            pace.wait(max(0.0, start + (picture.time or 0.0) - time.monotonic()))
                        yield Frame(number, time.time(), name, partial(reading.upright, picture))
                        number += 1
    except ImageError:
        raise
    except Exception as error:  # PyAV raises IndexError, AttributeError and others on damaged data
        is_silent = isinstance(error, av.error.ExitError)
        told = f"nothing for {patience[0]:g} seconds" if is_silent else one_line(error).replace(place, name)
        raise ImageError(
            f"source {short_name(name)}: expected frames of a video, got {told}; check the source"
        ) from error


def _name(place: str) -> str:
    return re.sub("//[^/?#]*@", "//", place)
