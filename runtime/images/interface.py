"""From a picture to the vision graph's inputs, whatever the family: sizes first, then arrays padded to a profile.

``PictureProcessing`` is all that the exporter and the pipeline know of pictures. Its kinds are tiles with newlines
(LLaVA), window-ordered patches (Qwen2.5-VL) and a grid of tiles with a thumbnail (InternVL); their arithmetic is in
``image_processing``, ``image_patches`` and ``image_grid_tiles``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.images.internvl import KIND as GRID_TILES
from trio_edge.runtime.images.internvl import GridTilePictures, GridTileProcessing
from trio_edge.runtime.images.llava import (
    ImageProcessing,
    TilePictures,
)
from trio_edge.runtime.images.qwen import PatchPictures, PatchProcessing

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

KEPT_PATCHES = "kept_patches"
KEPT_TOKENS = "kept_tokens"
"""Second output of a vision graph that reduces: patches of each tile, or visual tokens of the picture."""


class PictureProcessing(Protocol):
    """What a bundle does with pictures."""

    @property
    def encoder_keep(self) -> int | None:
        """Patches per tile, or visual tokens of the picture, that the vision graph keeps; None for all."""

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON types, with "kind"."""

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the vision graph's axes that a picture needs, N (its visual tokens) among them."""

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """Return sizes that have room for every picture, ascending."""

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs for an RGB picture, padded to ``sizes``.

        Raises:
            ImageError: If the picture cannot be processed.
        """

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """Return the box [N, 4] of each visual token on the picture in pixels; NaN where it shows nothing of it.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.
            kept: The vision graph's second output, if it reduces.
        """

    def overview_tokens(self, width: int, height: int) -> range:
        """Return which visual tokens are of a tile that shows the whole picture beside finer ones; for drawing."""

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Return [3, N]: time, row and column of each visual token for M-RoPE, counted from 0."""

    def position_span(self, width: int, height: int) -> int:
        """Return how many positions the picture takes with M-RoPE; its rows or columns, whichever are more."""


def picture_processing(values: Mapping[str, Any], *, encoder_keep: int | None) -> PictureProcessing:
    """Return the processing that ``PictureProcessing.to_dict`` wrote.

    Raises:
        ManifestError: If it is of an unknown kind, or a value breaks a rule.
    """
    if values.get("kind") == "patches":
        return PatchPictures(PatchProcessing.from_dict(values), encoder_keep=encoder_keep)
    if values.get("kind") == GRID_TILES:
        if encoder_keep is not None:
            raise ManifestError(
                f"encoder_keep: expected none with a grid of tiles, got {encoder_keep}; export the bundle again"
            )
        return GridTilePictures(GridTileProcessing.from_dict(values))
    return TilePictures(ImageProcessing.from_dict(values), encoder_keep=encoder_keep)
