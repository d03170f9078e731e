"""Asks a question about a camera's newest frame, repeatedly.

    python examples/camera.py /dev/video0 --bundle BUNDLE --prompt "Is the door open?"
    python examples/camera.py rtsp://camera/stream --bundle BUNDLE --prompt "How many people are there?"
    python examples/camera.py clip.mp4 --bundle BUNDLE --prompt "What happens?"

A thread reads the stream and keeps only the newest frame, so an answer is always about the present: frames that arrive during an
answer are skipped. A file is read at its own speed, like a camera. This needs the extra "video".
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from trio_edge.runtime import ImageError, Pipeline, TrioEdgeError
from trio_edge.runtime.cli.interruption import interruptible
from trio_edge.runtime.videos.reading import import_av

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

SECONDS_TO_OPEN, SECONDS_TO_READ = 10.0, 10.0
"""A stream without data for this time has ended."""


class Frame(NamedTuple):
    """A frame of the stream."""

    number: int
    picture: Any
    """PyAV's frame, converted to RGB only if it is asked about."""
    arrived: float
    """``time.monotonic`` seconds."""

    def image(self) -> Image.Image:
        return self.picture.to_image()  # type: ignore[no-any-return]

    def age(self) -> float:
        """Return the seconds since the frame arrived."""
        return time.monotonic() - self.arrived


class NewestFrame:
    """Reads a stream in a thread and keeps its newest frame."""

    def __init__(self, source: str) -> None:
        """Open the stream.

        Raises:
            ImageError: If it cannot be opened, or has no video.
        """
        self._av = import_av()
        self._source, self._is_live = source, source.startswith("/dev/") or "://" in source
        self._container = self._opened()
        self._slot: Frame | None = None
        self._error: ImageError | None = None
        self._has_ended, self._is_closed = False, threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, name="camera", daemon=True)
        self._thread.start()

    def _opened(self) -> Any:
        kind = "v4l2" if self._source.startswith("/dev/video") else None
        options = {"rtsp_transport": "tcp"} if self._source.startswith("rtsp") else {}
        try:
            container = self._av.open(
                self._source, format=kind, options=options, timeout=(SECONDS_TO_OPEN, SECONDS_TO_READ)
            )
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise self._failed("a stream that can be opened", error) from error
        if not container.streams.video:
            container.close()
            raise ImageError(
                f"camera {self._source!r}: expected a stream with video, got none; check the source"
            )
        return container

    def _failed(self, expected: str, error: BaseException) -> ImageError:
        what = " ".join(str(error).split())[:200]
        return ImageError(f"camera {self._source!r}: expected {expected}, got {type(error).__name__}: {what}")

    def _read(self) -> None:
        try:
            start = time.monotonic()
            for number, picture in enumerate(self._container.decode(video=0)):
                if not self._is_live:  # wait for the frame's time, as a camera would
                    self._is_closed.wait(max(0.0, start + (picture.time or 0.0) - time.monotonic()))
                if self._is_closed.is_set():
                    break
                self._put(Frame(number, picture, time.monotonic()))
        except (self._av.error.FFmpegError, OSError) as error:
            self._error = self._failed("a stream that does not break off", error)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> None:
        with self._changed:
            self._slot = frame
            self._changed.notify_all()

    def after(self, number: int, check: Callable[[], None] = lambda: None) -> Frame | None:
        """Wait for a frame after ``number`` and return the newest one; None at the end of the stream.

        Args:
            number: -1 for any frame.
            check: Called while waiting; may raise.

        Raises:
            ImageError: If the stream broke off.
        """
        with self._changed:
            while self._slot is None or self._slot.number <= number:
                check()
                if self._has_ended and self._error is not None:
                    raise self._error
                if self._has_ended:
                    return None
                self._changed.wait(timeout=0.2)  # so that Ctrl-C is noticed
            return self._slot

    def close(self) -> None:
        """End the thread and close the stream. A thread that still waits for a frame ends with the program."""
        self._is_closed.set()
        self._thread.join(timeout=1.0)
        if not self._thread.is_alive():
            self._container.close()

    def __enter__(self) -> NewestFrame:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch(
    camera: NewestFrame, pipeline: Pipeline, prompt: str, *, max_new_tokens: int, check: Callable[[], None]
) -> None:
    """Print answers about the newest frame until the stream ends."""
    number = -1
    while (frame := camera.after(number, check)) is not None:
        answer = pipeline.generate(frame.image(), prompt, max_new_tokens=max_new_tokens).text
        print(f"frame {frame.number}, {frame.age():.2f} s old: {answer.strip()}", flush=True)
        number = frame.number
        check()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Asks a question about a camera's newest frame, repeatedly.")
    parser.add_argument("source", help="V4L2 device (/dev/video0), RTSP address or video file")
    parser.add_argument("--bundle", required=True, help="bundle folder, from trio-export")
    parser.add_argument("--prompt", default="What is in the image?", help="question about each frame")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="most new tokens of an answer")
    parser.add_argument("--backend", default="auto", help="trio-run's option")
    arguments = parser.parse_args(argv)
    try:
        with (
            interruptible() as check,
            Pipeline.from_bundle(arguments.bundle, backend=arguments.backend) as pipeline,
            NewestFrame(arguments.source) as camera,  # opened last, when the bundle is ready
        ):
            watch(camera, pipeline, arguments.prompt, max_new_tokens=arguments.max_new_tokens, check=check)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    except TrioEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
