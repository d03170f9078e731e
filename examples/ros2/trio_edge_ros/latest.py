"""Everything of the node that needs no ROS: pixels of image messages, and a thread that answers about the newest one."""

from __future__ import annotations

import threading
from array import array
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Queue
from typing import TYPE_CHECKING, Any

import numpy as np

from trio_edge.runtime import ImageError, TrioEdgeError, Watcher, from_bgr
from trio_edge.runtime.videos.live import put_newest

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from PIL import Image

BANDS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1}


def pixels_of(message: Any) -> NDArray[np.uint8]:
    """Return the pixels of a sensor_msgs/Image as trio-edge takes them, without a copy.

    Raises:
        ImageError: If its encoding is another one, or it has fewer bytes than its size says.
    """
    encoding, height, width, step = message.encoding, message.height, message.width, message.step
    if encoding not in BANDS:
        raise ImageError(f"image: expected one of {', '.join(BANDS)}, got {encoding!r:.80}; convert it")
    bands, data = BANDS[encoding], np.frombuffer(message.data, np.uint8)
    if step < width * bands or data.size < height * step:
        raise ImageError(
            f"image: expected {height} rows of {step} bytes for {width} pixels, got {data.size}; check the driver"
        )
    # Rows may be padded.
    rows = data[: height * step].reshape(height, step)[:, : width * bands]
    if bands == 1:
        return rows
    pixels = rows.reshape(height, width, bands)
    return from_bgr(pixels) if encoding.startswith("bgr") else pixels


def fill(message: Any, image: Image.Image, header: Any) -> Any:
    """Write an RGB image into a new sensor_msgs/Image and return it."""
    message.header, message.encoding, message.is_bigendian = header, "rgb8", 0
    message.height, message.width, message.step = image.height, image.width, 3 * image.width
    message.data = array("B", image.tobytes())  # rclpy checks bytes one by one
    return message


@dataclass
class Outputs:
    """Where events go."""

    decision: Callable[[str], None]
    """Called with the JSON of each event."""
    overlay: Callable[[Image.Image, Any], None]
    """Called with the drawing of an event and the header of its image."""
    wants_overlay: Callable[[], bool]
    """Whether somebody looks at the drawings, which take time."""
    warn: Callable[[str], None]


class LatestImage:
    """Answers about the newest message in a thread of its own; messages that come during an answer replace each other."""

    def __init__(self, watcher: Watcher, outputs: Outputs, *, source: str) -> None:
        self._watcher, self._outputs, self._source = watcher, outputs, source
        self._waiting: Queue[tuple[int, Any] | None] = Queue(1)
        self._num_messages, self._has_warned = 0, False
        self._thread = threading.Thread(target=self._answer_all, name="trio-edge", daemon=True)
        self._thread.start()

    def put(self, message: Any) -> None:
        """Take an image message; returns at once."""
        put_newest(self._waiting, (self._num_messages, message))
        self._num_messages += 1

    def close(self) -> None:
        """End after the answer that runs."""
        with suppress(Empty):
            self._waiting.get_nowait()
        self._waiting.put(None)
        self._thread.join()

    def _answer_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._answer(*item)
                self._has_warned = False
            except TrioEdgeError as error:
                if not self._has_warned:  # an encoding is wrong in every frame
                    self._outputs.warn(str(error))
                self._has_warned = True

    def _answer(self, number: int, message: Any) -> None:
        stamp = message.header.stamp
        at = stamp.sec + 1e-9 * stamp.nanosec
        for event in self._watcher.see(pixels_of(message), frame=number, at=at):
            self._outputs.decision(event.to_json(source=self._source))
            if self._outputs.wants_overlay():
                self._outputs.overlay(self._watcher.drawing(event), message.header)
