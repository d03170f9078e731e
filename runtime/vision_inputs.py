"""From a picture to the vision graph's inputs, whatever the family: sizes first, then arrays padded to a profile.

``PictureProcessing`` is all that the exporter and the pipeline know of pictures. Its kinds are tiles with newlines
(LLaVA), window-ordered patches (Qwen2.5-VL) and a grid of tiles with a thumbnail (InternVL); their arithmetic is in
``image_processing``, ``image_patches`` and ``image_grid_tiles``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np

from trio_edge.runtime.errors import ManifestError
from trio_edge.runtime.image_grid_tiles import KIND as GRID_TILES
from trio_edge.runtime.image_grid_tiles import GridTileProcessing
from trio_edge.runtime.image_patches import PatchProcessing
from trio_edge.runtime.image_processing import (
    ImageProcessing,
    max_tiles,
    max_visual_tokens,
    num_tiles,
    num_visual_tokens,
    prepare,
    token_boxes,
    token_index,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

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


@final
class TilePictures:
    """Square tiles with a token per patch, and newlines between rows of a grid."""

    def __init__(self, processing: ImageProcessing, *, encoder_keep: int | None) -> None:
        self.processing = processing
        self.encoder_keep = encoder_keep

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; B is the number of tiles."""
        tiles = num_tiles(width, height, self.processing)
        if self.encoder_keep is not None:
            return {"B": tiles, "N": tiles * self.encoder_keep}
        return {"B": tiles, "N": num_visual_tokens(width, height, self.processing)}

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: the largest N with every possible number of tiles."""
        processing, side = self.processing, self.processing.tile_size
        largest = max_tiles(processing)
        rows = max_visual_tokens(processing) if self.encoder_keep is None else largest * self.encoder_keep
        counts = {1 + (height // side) * (width // side) for height, width in processing.grid_pinpoints} or {
            1
        }
        return tuple({"B": count, "N": rows} for count in sorted(counts))

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        prepared = prepare(picture, self.processing, pad_to_tiles=sizes["B"])
        used = prepared.token_index
        if self.encoder_keep is not None:  # the graph has rows of kept patches only, no newline
            used = np.arange(prepared.num_tiles * self.encoder_keep, dtype=np.int32)
        index = np.zeros(sizes["N"], np.int32)
        index[: len(used)] = used
        return {"pixel_values": prepared.pixel_values, "token_index": index}

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        boxes = token_boxes(width, height, self.processing)
        if kept is None:
            return boxes
        tiles, num_patches = num_tiles(width, height, self.processing), self.processing.patches_per_tile
        box_of_patch = np.full((tiles * num_patches + 1, 4), np.nan, np.float32)
        box_of_patch[token_index(width, height, self.processing)] = boxes
        tile_start = np.arange(tiles)[:, None] * num_patches
        box_of_token: NDArray[np.float32] = box_of_patch[(tile_start + kept[:tiles]).ravel()]
        return box_of_token

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: the base tile's, which come first."""
        if self.processing.kind == "single":
            return range(0)
        return range(self.processing.patches_per_tile if self.encoder_keep is None else self.encoder_keep)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Raise: models with tiles have ordinary positions."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")

    def position_span(self, width: int, height: int) -> int:
        """See ``positions``."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")


@final
class PatchPictures:
    """Patches of a picture scaled to whole patches, in the order of the vision encoder's windows."""

    def __init__(self, processing: PatchProcessing, *, encoder_keep: int | None) -> None:
        self.processing = processing
        self.encoder_keep = encoder_keep

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; P is the number of patches, W that of windows."""
        return self._reduced(self.processing.sizes(width, height))

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: one size, that of the largest pictures."""
        return (self._reduced(self.processing.max_sizes()),)

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        if self.encoder_keep is None:
            return self.processing.prepare(picture, sizes)
        inputs = self.processing.prepare(picture, {name: sizes[name] for name in ("P", "W")})
        index = np.zeros(sizes["N"], np.int32)  # the graph's rows are the kept tokens
        num_kept = self.sizes(*picture.size)["N"]
        index[:num_kept] = np.arange(num_kept)
        return {**inputs, "token_index": index}

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        boxes = self.processing.token_boxes(width, height)
        return boxes if kept is None else boxes[self._real(kept, width, height)]

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: none."""
        return range(0)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """See ``PictureProcessing.positions``."""
        rows, columns = np.indices(self.processing.token_grid(width, height), dtype=np.int32)
        positions = np.stack([np.zeros_like(rows), rows, columns]).reshape(3, -1)
        return positions if kept is None else positions[:, self._real(kept, width, height)]

    def position_span(self, width: int, height: int) -> int:
        """See ``PictureProcessing.position_span``."""
        return max(self.processing.token_grid(width, height))

    def _real(self, kept: NDArray[np.int32], width: int, height: int) -> NDArray[np.int32]:
        return kept[: self.sizes(width, height)["N"]]

    def _reduced(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Return the sizes with the encoder's reduction, whose selection needs room for all that it keeps."""
        keep = self.encoder_keep
        if keep is None:
            return dict(sizes)
        return {
            **sizes,
            "P": max(sizes["P"], keep * self.processing.merge_size**2),
            "N": min(sizes["N"], keep),
        }


@final
class GridTilePictures:
    """Tiles of a grid, row by row, and a thumbnail of the whole picture last; as many visual tokens of each."""

    encoder_keep: int | None = None

    def __init__(self, processing: GridTileProcessing) -> None:
        self.processing = processing

    def to_dict(self) -> dict[str, Any]:
        """See ``PictureProcessing.to_dict``."""
        return self.processing.to_dict()

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """See ``PictureProcessing.sizes``; B is the number of tiles, the thumbnail among them."""
        return self.processing.sizes(width, height)

    def any_picture_sizes(self) -> tuple[dict[str, int], ...]:
        """See ``PictureProcessing.any_picture_sizes``: the largest N with a few numbers of tiles."""
        return self.processing.any_picture_sizes()

    def prepare(self, picture: Image.Image, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """See ``PictureProcessing.prepare``."""
        return self.processing.prepare(picture, sizes)

    def boxes(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.float32]:
        """See ``PictureProcessing.boxes``."""
        return self.processing.token_boxes(width, height)

    def overview_tokens(self, width: int, height: int) -> range:
        """See ``PictureProcessing.overview_tokens``: the thumbnail's."""
        return self.processing.thumbnail_tokens(width, height)

    def positions(self, width: int, height: int, kept: NDArray[np.int32] | None) -> NDArray[np.int32]:
        """Raise: models with tiles have ordinary positions."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")

    def position_span(self, width: int, height: int) -> int:
        """See ``positions``."""
        raise ManifestError("position_axes: expected 1 with picture tiles, got 3; export the bundle again")
