"""Small videos for tests, written with PyAV."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.pictures import random_picture


def write_video(
    path: Path,
    num_frames: int,
    *,
    size: tuple[int, int] = (64, 48),
    fps: Fraction | int = 10,
    codec: str = "mpeg4",
    level_step: int | None = None,
) -> Path:
    """Write a video whose frames are all different, and return its path.

    Args:
        path: Its suffix chooses the container.
        num_frames: Frames in all; 0 writes a container without any.
        size: (width, height) in pixels, even numbers.
        fps: Frames per second.
        codec: A PyAV name.
        level_step: With it, frame i has the grey level i * ``level_step`` everywhere; else it is random.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for index in range(num_frames):
            if level_step is None:
                pixels = np.asarray(random_picture(*size, seed=index))
            else:
                pixels = np.full((size[1], size[0], 3), index * level_step, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path
