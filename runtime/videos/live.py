"""Frames as they come: from a camera, a stream, a video file or a folder of images.

| source                                     | frames                                              |
|--------------------------------------------|-----------------------------------------------------|
| a camera's number, or /dev/video0          | the newest one; opened again when the camera is lost |
| rtsp://, rtsps://, http:// or https://     | the newest one; likewise                             |
| a video file, a folder of images           | every one, in order                                  |
| a video file with ``live``                 | the newest one, at the file's own speed              |
| a folder of images with ``live``           | the newest image, and each that is written later     |

PyAV reads cameras and streams too: it already reads video files here, and FFmpeg's V4L2 and RTSP are in its wheel. A device or
an address is opened only if it is the source itself, never because a file names it.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, final

from trio_edge.runtime.bundle.errors import ImageError
from trio_edge.runtime.bundle.limits import MAX_IMAGE_PIXELS
from trio_edge.runtime.images.reading import file_of, one_line, open_image, short_name
from trio_edge.runtime.videos.reading import (
    FORMATS,
    first_stream,
    images_in,
    import_av,
    open_container,
    upright,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from PIL import Image

SECONDS_WITHOUT_DATA = 10.0
"""A camera or stream that gives nothing for so long counts as lost."""
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0
"""Seconds before a lost camera is opened again; each wait is twice the last one."""
_SECONDS_TO_LOOK = 0.5  # into a folder
_SECONDS_TO_CLOSE = 1.0

_WEB = {"protocol_whitelist": "http,https,tls,tcp", "format_whitelist": f"{FORMATS},mpjpeg"}
# Over TCP, since UDP loses packets on a busy network and FFmpeg then shows grey blocks.
_RTSP = {
    "protocol_whitelist": "rtsp,rtsps,rtp,udp,tcp,tls",
    "format_whitelist": "rtsp",
    "rtsp_transport": "tcp",
}
_ADDRESSES = {"http": _WEB, "https": _WEB, "rtsp": _RTSP, "rtsps": _RTSP}
_Item = TypeVar("_Item")


class Frame(NamedTuple):
    """A frame that is converted to an RGB image only if somebody looks at it."""

    number: int
    """From 0; skipped frames count."""
    time: float
    """Seconds since 1970 when it was read."""
    source: str
    """The source's name; of a folder, the image's path."""
    image: Callable[[], Image.Image]


class Source(NamedTuple):
    """A place that frames come from."""

    place: str
    """A device, an address, or the path of a file or folder."""
    options: dict[str, str] | None
    """FFmpeg's, for a device or an address; None for a file or folder."""
    name: str
    """For messages: without user and password."""


def source_of(text: str) -> Source:
    """Return what a user calls a source; opens nothing.

    Raises:
        ImageError: If it is missing, or nothing that has frames.
    """
    if re.fullmatch(r"\d{1,3}", text):
        text = f"/dev/video{text}"
    address = re.match(r"([a-z][a-z0-9+.-]*)://", text, re.IGNORECASE)
    if address:
        options = _ADDRESSES.get(address[1].lower())
        name = re.sub(r"//[^/?#]*@", "//", text)
        if options is None:
            raise ImageError(
                f"source {short_name(name)}: expected rtsp://, rtsps://, http:// or https://, got {address[1]}; use one of"
                " them"
            )
        return Source(text, options, name)
    try:
        path = Path(text)
        if path.is_char_device():
            return Source(text, {}, text)
        if path.is_dir():
            return Source(text, None, text)
    except (OSError, ValueError):  # told by file_of
        pass
    file_of(text, kind="video")
    return Source(text, None, text)


@contextmanager
def open_frames(
    source: Source, *, live: bool = False, note: Callable[[str], None] = lambda _text: None
) -> Iterator[Iterable[Frame]]:
    """Yield the frames of a source, read while the block lasts; the first one opens it.

    Args:
        source: Where they come from.
        live: Also of a file or folder only the newest frame.
        note: Called with one line when a camera is lost, and when it is back.

    Iterating raises ImageError if the source cannot be opened, or a file is damaged. A camera that once gave a frame and is lost
    raises nothing: it is opened again, after growing waits.
    """
    closed = threading.Event()
    if source.options is not None:
        frames = _camera(source, closed, note)
    elif Path(source.place).is_dir():
        frames = _written_images(Path(source.place), closed) if live else _images(Path(source.place))
    else:
        frames = _pictures(source, closed, is_paced=live)
    if source.options is None and not live:
        yield frames
        return
    newest: Newest[Frame] = Newest()
    thread = threading.Thread(target=_read, args=(frames, newest, closed), name="frames", daemon=True)
    thread.start()
    try:
        yield newest
    finally:
        closed.set()
        thread.join(_SECONDS_TO_CLOSE)  # a thread that still waits for a frame ends with the program


@final
class Newest(Generic[_Item]):
    """Hands the newest item of one thread to another, which iterates; older ones that nobody took are dropped."""

    def __init__(self) -> None:
        self._items: deque[_Item] = deque(maxlen=1)
        self._changed = threading.Condition()
        self._has_ended = False
        self._error: Exception | None = None

    def put(self, item: _Item) -> None:
        """Replace an item that nobody took."""
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """Let the iteration end after the last item, with ``error`` if there is one."""
        with self._changed:
            self._has_ended, self._error = True, error
            self._changed.notify_all()

    def __iter__(self) -> Iterator[_Item]:
        """Yield the newest item, waiting for one."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._has_ended)
                if not self._items and self._error is not None:
                    raise self._error
                if not self._items:
                    return
                item = self._items.pop()
            yield item


def _read(frames: Iterator[Frame], newest: Newest[Frame], closed: threading.Event) -> None:
    try:
        for frame in frames:
            newest.put(frame)
            if closed.is_set():
                break
        newest.end()
    except Exception as error:  # raised again where the frames are taken
        newest.end(error)


def _images(folder: Path) -> Iterator[Frame]:
    if not (paths := images_in(folder)):
        raise ImageError(
            f"source {short_name(folder)}: expected at least one image, got none; name another folder"
        )
    for number, path in enumerate(paths):
        yield Frame(number, time.time(), str(path), partial(open_image, path))


def _written_images(folder: Path, closed: threading.Event) -> Iterator[Frame]:
    """Yield the newest image of a folder whenever it is another one, and whole."""
    number, last = 0, (0, "")
    while not closed.wait(_SECONDS_TO_LOOK if number else 0.0):
        try:
            newest = max(((path.stat().st_mtime_ns, str(path)) for path in images_in(folder)), default=last)
            if newest == last:
                continue
            image = open_image(newest[1])
        except (ImageError, OSError):  # half written: it is looked at again; or deleted
            continue
        yield Frame(number, time.time(), newest[1], image.copy)
        number, last = number + 1, newest


def _camera(source: Source, closed: threading.Event, note: Callable[[str], None]) -> Iterator[Frame]:
    number, wait, is_lost = 0, FIRST_WAIT, False
    while not closed.is_set():
        reason = f"source {short_name(source.name)}: ended"
        try:
            for picture in _pictures(source, closed):
                if is_lost:
                    note(f"source {short_name(source.name)}: is back")
                yield picture._replace(number=number)
                number, wait, is_lost = number + 1, FIRST_WAIT, False
        except ImageError as error:
            if number == 0:
                raise
            reason = str(error)
        if not is_lost:
            note(f"{reason}; opening it again until it is back")
        is_lost = True
        closed.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT)


def _pictures(source: Source, closed: threading.Event, *, is_paced: bool = False) -> Iterator[Frame]:
    """Yield what PyAV reads; ``is_paced`` waits for each frame's time, as a camera would."""
    av = import_av()
    try:
        with _opened(av, source) as container:
            stream = first_stream(av, container, name=f"source {short_name(source.name)}")
            stream.codec_context.options = {"max_pixels": str(MAX_IMAGE_PIXELS)}
            # Threads that share a frame delay none; threads with a frame each hold back as many frames.
            stream.thread_type = "AUTO" if source.options is None else "SLICE"
            start = None
            for number, picture in enumerate(_decoded(av, container, stream, skips=bool(source.options))):
                if is_paced:
                    start = time.monotonic() - (picture.time or 0.0) if start is None else start
                    closed.wait(max(0.0, start + (picture.time or 0.0) - time.monotonic()))
                yield Frame(number, time.time(), source.name, partial(upright, picture))
    except ImageError:
        raise
    except av.error.ExitError as error:
        told = f"nothing for {SECONDS_WITHOUT_DATA:.0f} seconds"
        raise ImageError(_unreadable(source, told)) from error
    except Exception as error:  # PyAV raises IndexError, AttributeError and others on damaged data
        raise ImageError(_unreadable(source, one_line(error))) from error


def _unreadable(source: Source, got: str) -> str:
    got = got.replace(source.place, source.name)  # its password
    return f"source {short_name(source.name)}: expected frames of a video, got {got}; check the source"


def _opened(av: Any, source: Source) -> Any:
    if source.options is None:
        return open_container(av, Path(source.place))
    kind = None if source.options else "v4l2"
    patience = (SECONDS_WITHOUT_DATA, SECONDS_WITHOUT_DATA)
    return av.open(
        source.place, format=kind, options=source.options, timeout=patience, metadata_errors="replace"
    )


def _decoded(av: Any, container: Any, stream: Any, *, skips: bool) -> Iterator[Any]:
    """Yield decoded frames; ``skips`` packets that cannot be decoded, such as those before the first whole frame."""
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            if not skips:
                raise
