"""From an image to an overview and slices of equal shape (MiniCPM-V 4.6).

An image with more pixels than a slice is shown twice: as a whole, and cut into slices, which are stretched to about the pixels
of a square of ``tile_size``, at their own shape. The vision encoder merges patches twice, in blocks of 2x2, so patches stand in
blocks of 16: each block is one visual token, and four that follow each other are one after the first merge. Each slice has
room for the most patches; later ones are padding. The prompt counts the images, and marks the overview and each slice, so an
image has several runs of visual tokens.

Source: MiniCPMV4_6ImageProcessor and MiniCPMV4_6Processor of transformers 5.24.
Letters: B slices and overview, P patches of a slice with padding, F numbers of a patch, N visual tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.resizing import resize

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from PIL import Image

_HALF = (0.5, 0.5, 0.5)
_SIDES = {"16x": 4, "4x": 2}
"""Patches along a side of a visual token."""


@final
class MiniCpmImages(
    processing.ImageConstants, frozen=True, kw_only=True, tag_field="kind", tag="sliced_image"
):
    """Image processing with an overview and slices, which the prompt numbers by image."""

    patch_size: processing.Size = 14
    merge_size: Literal[2, 4] = 4
    """Patches along a side of a visual token."""
    tile_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 14)] = 448
    """Side in pixels of a square with the pixels of a slice."""
    max_tiles: processing.Count = 9
    """Most slices; 1 if images are not cut."""
    table_side: processing.Size
    """Rows and columns of the vision encoder's table of positions."""
    is_numbered: bool = True
    """Whether each image's tokens follow its number in the prompt."""
    id_marks: tuple[str, str] = ("<image_id>", "</image_id>")
    image_marks: tuple[str, str] = ("<image>", "</image>")
    """Text before and after the tokens of the whole image."""
    slice_marks: tuple[str, str] = ("<slice>", "</slice>")
    image_mean: processing.Colour = _HALF
    image_std: processing.Spread = _HALF

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], **model: Any) -> MiniCpmImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``model`` are ``table_side`` and the marks that the tokenizer names.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processing.processor_values(config, "MiniCPMV4_6ImageProcessor")
        mode = values.get("downsample_mode", "16x")
        if mode not in _SIDES:
            raise CheckpointError(
                f"preprocessor_config downsample_mode: expected {' or '.join(_SIDES)}, got {mode!r:.80}"
            )
        names = {
            "scale_resolution": "tile_size",
            "max_slice_nums": "max_tiles",
            "use_image_id": "is_numbered",
        }
        with processing.only_checkpoint_errors():
            fields = {name: values[key] for key, name in names.items() if key in values}
            if not values.get("slice_mode", True):
                fields["max_tiles"] = 1
            fields["merge_size"] = _SIDES[mode]
            return cls.from_dict(fields | processing.pixel_fields(values, "patch_size") | model)

    @property
    def token_size(self) -> int:
        """Side of a visual token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def most_tokens(self) -> int:
        """Visual tokens that fit a slice: those of any shape up to about 1:5, and of most longer ones."""
        side = self.tile_size / self.token_size
        rows = range(max(1, math.ceil(side / 2)), math.ceil(side) + 1)
        return max(row * max(1, round(side**2 / (row - 0.5))) for row in rows)

    @property
    def patches_per_tile(self) -> int:
        """P."""
        return self.merge_size**2 * self.most_tokens

    def at_base(self) -> MiniCpmImages | None:
        """Return the processing that makes only the overview."""
        return msgspec.structs.replace(self, max_tiles=1) if self.max_tiles > 1 else None

    def within(self, width: int, height: int) -> MiniCpmImages | None:
        """Return the processing with at most as many slices as an image of this size has."""
        most = -(-width * height // self.tile_size**2)
        return msgspec.structs.replace(self, max_tiles=min(self.max_tiles, most))

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of slices, (1, 1) without; raise ImageError if the image is empty.

        Source: get_sliced_grid.
        """
        processing.check_not_empty(width, height)
        wanted = min(math.ceil(width * height / self.tile_size**2), self.max_tiles)
        best, least = (1, 1), math.inf
        if wanted <= 1:
            return best
        for count in range(max(2, wanted - 1), min(wanted + 1, self.max_tiles) + 1):
            for rows in (rows for rows in range(1, count + 1) if count % rows == 0):
                error = abs(math.log(width / height) - math.log(count // rows / rows))
                if error < least or (error == least and rows > best[0]):
                    best, least = (rows, count // rows), error
        return best

    def _fitted(self, width: float, height: float, *, is_enlarged: bool) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of a slice with this shape. Source: find_best_resize.

        Raises:
            ImageError: If they do not fit a slice.
        """
        wide, tall = width, height
        if is_enlarged or width * height > self.tile_size**2:
            tall = int(self.tile_size / math.sqrt(width / height))
            wide = int(tall * (width / height))
        rows, columns = (max(round(side / self.token_size), 1) for side in (tall, wide))
        if rows * columns > self.most_tokens:
            raise ImageError(
                f"image: expected sides that leave at most {self.most_tokens} visual tokens in a slice, got {columns}x{rows} for"
                f" {width:.0f}x{height:.0f} pixels; crop it"
            )
        return rows, columns

    def token_grids(self, width: int, height: int) -> tuple[tuple[int, int], tuple[int, int] | None]:
        """Return the rows and columns of visual tokens of the overview, and of each slice; None without slices."""
        rows, columns = self.grid(width, height)
        whole = self._fitted(width, height, is_enlarged=rows * columns == 1)
        if rows * columns == 1:
            return whole, None
        sides = (max(round(side / count), 1) for side, count in ((width, columns), (height, rows)))
        return whole, self._fitted(*sides, is_enlarged=True)

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return B, the number of slices and the overview, and N."""
        tiles = math.prod(self.grid(width, height))
        whole, part = self.token_grids(width, height)
        if part is None:
            return {"B": 1, "N": math.prod(whole)}
        return {"B": 1 + tiles, "N": math.prod(whole) + tiles * math.prod(part)}

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the largest N for a few numbers of slices."""
        counts = processing.few_counts([1, *range(3, self.max_tiles + 2)])
        return tuple({"B": count, "N": count * self.most_tokens} for count in counts)

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image; the overview comes first."""
        (rows, columns), (whole, part) = self.grid(width, height), self.token_grids(width, height)
        runs, text = [math.prod(whole)], [self.image_marks[0]]
        if part is not None:
            runs += [math.prod(part)] * (rows * columns)
            start, end = self.slice_marks
            between = [
                f"{end}\n{start}" if not number % columns else end + start
                for number in range(1, rows * columns)
            ]
            text += [self.image_marks[1] + start, *between, end]
        else:
            text.append(self.image_marks[1])

        def make_boxes() -> NDArray[np.float32]:
            boxes = [processing.tile_boxes(width, height, (1, 1), whole)]
            if part is not None:
                boxes.append(processing.tile_boxes(width, height, (rows, columns), part))
            return np.concatenate(boxes)

        return processing.ImageLayout(
            width=width,
            height=height,
            sizes=self.sizes(width, height),
            make_boxes=make_boxes,
            overview=range(runs[0]) if part is not None else range(0),
            text=tuple(text),
            number_marks=self.id_marks if self.is_numbered else None,
            run_lengths=tuple(runs),
        )

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the inputs of ``export/graphs/vision/minicpm.py``: patches in blocks, padded with 0.

        Arguments and errors are those of ``ImageProcessing.prepare``.
        """
        room = processing.room_for(self.sizes(*image.size), sizes, image=image)
        most, merge = self.patches_per_tile, self.merge_size**2
        pixels = np.zeros((room["B"], most, 3 * self.patch_size**2), np.float32)
        table, count, index = np.zeros((room["B"], most), np.int32), np.zeros(room["B"], np.int32), []
        for number, levels in enumerate(self._slices(image)):
            tall, wide = (side // self.patch_size for side in levels.shape[:2])
            numbers = processing.normalized(levels, self)
            numbers = numbers.reshape(tall, self.patch_size, wide, self.patch_size, 3).transpose(
                0, 2, 4, 1, 3
            )
            order, size = self._order(tall, wide), tall * wide
            pixels[number, :size] = numbers.reshape(size, -1)[order]
            # the table's cell at the same share of its side. transformers compares such shares in float32.
            row, column = (np.arange(side) * self.table_side // side for side in (tall, wide))
            table[number, :size] = (row[:, None] * self.table_side + column).ravel()[order]
            count[number] = size
            index.append(number * most // merge + np.arange(size // merge))
        return {
            io.PIXEL_VALUES: pixels,
            io.TABLE_INDEX: table,
            io.NUM_PATCHES: count,
            io.TOKEN_INDEX: processing.padded_index(np.concatenate(index), room["N"]),
        }

    def _slices(self, image: Image.Image) -> list[NDArray[np.uint8]]:
        """Return the pixels of the overview and of each slice, row by row."""
        (rows, columns), (whole, part) = self.grid(*image.size), self.token_grids(*image.size)
        size = self.token_size
        slices = [resize(image, (whole[0] * size, whole[1] * size), resample=self.resample)]
        if part is not None:
            tall, wide = part[0] * size, part[1] * size
            levels = resize(image, (rows * tall, columns * wide), resample=self.resample)
            levels = levels.reshape(rows, tall, columns, wide, 3).transpose(0, 2, 1, 3, 4)
            slices += [*levels.reshape(-1, tall, wide, 3)]
        return slices

    def _order(self, tall: int, wide: int) -> NDArray[np.int64]:
        """Return the patches, counted row by row, in blocks of a visual token, and in it in blocks of 2x2."""
        merge, index = self.merge_size, np.arange(tall * wide)
        blocks = index.reshape(tall // merge, merge // 2, 2, wide // merge, merge // 2, 2)
        return blocks.transpose(0, 3, 1, 4, 2, 5).ravel()
