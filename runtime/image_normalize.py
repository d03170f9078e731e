"""From grey levels to the vision encoder's numbers: the arithmetic and the checks that all kinds of processing share.

Source: TorchvisionBackend.rescale_and_normalize of transformers 5.23, which folds the rescaling into mean and standard
deviation.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trio_edge.runtime.errors import ManifestError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PixelConstants(Protocol):
    """How levels become numbers."""

    @property
    def do_rescale(self) -> bool:
        """Multiply by ``rescale_factor``."""

    @property
    def do_normalize(self) -> bool:
        """Subtract ``image_mean`` and divide by ``image_std``, per channel."""

    @property
    def rescale_factor(self) -> float:
        """1 / 255 for numbers from 0 to 1."""

    @property
    def image_mean(self) -> tuple[float, float, float]:
        """Red, green, blue, after rescaling."""

    @property
    def image_std(self) -> tuple[float, float, float]:
        """Red, green, blue, after rescaling."""


def normalized(levels: NDArray[np.uint8], constants: PixelConstants) -> NDArray[np.float32]:
    """Return the vision encoder's numbers; one subtraction and one division, as torchvision does it.

    Args:
        levels: [..., 3], channels last.
        constants: Of the bundle.

    Returns:
        float32 of the same shape.
    """
    pixels = levels.astype(np.float32)
    factor = constants.rescale_factor if constants.do_rescale else 1.0
    if not constants.do_normalize:
        return pixels * np.float32(factor)
    pixels -= np.asarray(constants.image_mean, np.float32) * np.float32(1.0 / factor)
    pixels /= np.asarray(constants.image_std, np.float32) * np.float32(1.0 / factor)
    return pixels


def check_pixel_constants(constants: PixelConstants) -> None:
    """Raise ManifestError unless the values can be calculated with."""
    for name in ("do_rescale", "do_normalize"):
        if type(getattr(constants, name)) is not bool:
            raise ManifestError(
                f"image_processing {name}: expected true or false, got {getattr(constants, name)!r}"
            )
    for name in ("image_mean", "image_std"):
        values = getattr(constants, name)
        if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_finite, values)):
            raise ManifestError(f"image_processing {name}: expected three finite numbers, got {values!r}")
    if min(constants.image_std) <= 0:
        raise ManifestError(f"image_processing image_std: expected numbers > 0, got {constants.image_std}")
    if not _is_finite(constants.rescale_factor) or constants.rescale_factor <= 0:
        raise ManifestError(
            f"image_processing rescale_factor: expected a number > 0, got {constants.rescale_factor!r}"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
