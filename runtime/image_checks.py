"""What all kinds of picture processing ask of a picture, and the boxes between edges on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from trio_edge.runtime.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

_WHAT = {"B": "tiles", "N": "visual tokens", "P": "patches", "W": "attention windows"}


def check_rgb(picture: Image.Image) -> None:
    """Raise ImageError unless ``picture`` is RGB."""
    if picture.mode != "RGB":
        raise ImageError(f"picture: expected mode 'RGB', got {picture.mode!r}; read it with open_picture")


def check_not_empty(width: int, height: int) -> None:
    """Raise ImageError unless a picture of this size has pixels."""
    if width < 1 or height < 1:
        raise ImageError(f"picture: expected at least 1x1 pixels, got {width}x{height}")


def check_room(own: Mapping[str, int], room: Mapping[str, int], *, width: int, height: int) -> None:
    """Raise ImageError if a picture of this size needs more than the graph has room for.

    Args:
        own: What the picture needs on each axis (B, N, P or W).
        room: What the graph has.
        width: Of the picture, in pixels.
        height: Of the picture, in pixels.
    """
    for axis, needed in own.items():
        if needed > room[axis]:
            raise ImageError(
                f"picture: expected at most {room[axis]} {_WHAT[axis]} (the exported shapes), got {needed} for"
                f" {width}x{height} pixels; resize it or export with a larger --image-size"
            )


def boxes_between(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the boxes [rows, columns, 4], (x0, y0, x1, y1), between the edges ``x`` [columns + 1] and ``y`` [rows + 1]."""
    left, top = np.meshgrid(x[:-1], y[:-1])
    right, bottom = np.meshgrid(x[1:], y[1:])
    return np.stack([left, top, right, bottom], axis=-1)
