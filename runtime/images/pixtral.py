"""From an image to patches at its own aspect ratio, for Pixtral's tower (Ministral 3), with text after each row of tokens.

An image whose longer side exceeds ``longest_edge`` is reduced; then both sides are rounded up to whole visual tokens of
``merge_size``² patches. The prompt has a mark after each row of visual tokens, and another one after the last row.

Source: PixtralImageProcessor and PixtralProcessor of transformers 5.23.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.runtime.bundle import graph_io as io
from trio_edge.runtime.bundle.errors import CheckpointError, ImageError
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.qwen import GridImages, Patches
from trio_edge.runtime.images.tiles import longest_edge_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_MOST_PROFILES = 4  # the smallest one has an eighth of the largest one's tokens
_FEWEST_TOKENS = (
    16  # smaller ones gain nothing, and tensorrt-rtx 1.7 never ends on a select graph with six or fewer
)


@final
class PixtralImages(GridImages, frozen=True, kw_only=True, tag_field="kind", tag="patch_rows"):
    """Image processing of Pixtral's tower, whose tokens the prompt breaks into rows."""

    temporal_patch_size: processing.Size = 1
    longest_edge: processing.Size = 1024
    """Images with a longer side are reduced to it; smaller ones keep their size."""
    break_mark: str = "[IMG_BREAK]"
    """Text after each row of visual tokens but the last."""
    end_mark: str = "[IMG_END]"
    """Text after the last row."""

    @classmethod
    def from_preprocessor_config(cls, config: Mapping[str, Any], **model: Any) -> PixtralImages:
        """Return the constants of a ``preprocessor_config.json``; missing keys have the defaults of Hugging Face's class.

        ``model`` are the fields that come from the model and its processor: sizes of patches and tokens, and marks.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        _, values = processing.processor_values(config, "PixtralImageProcessor")
        if values.get("do_center_crop"):
            raise CheckpointError("preprocessor_config do_center_crop: expected false, got true")
        with processing.only_checkpoint_errors():
            edge = longest_edge_of(values, "size", 1024)
            return cls.from_dict({"longest_edge": edge, **model, **processing.pixel_fields(values)})

    def at_low(self) -> PixtralImages:
        """Return the processing that reduces images to at most a quarter of the most pixels."""
        return msgspec.structs.replace(self, longest_edge=max(self.longest_edge // 2, 1))

    def within(self, width: int, height: int) -> PixtralImages | None:
        """Return the processing whose longer side is at most that of this size."""
        return msgspec.structs.replace(self, longest_edge=min(self.longest_edge, max(width, height)))

    def token_grid(self, width: int, height: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens; errors are those of ``GridImages.token_grid``.

        Source: get_resize_output_image_size.
        """
        processing.check_not_empty(width, height)
        ratio = max(height / self.longest_edge, width / self.longest_edge)
        reduced = (height, width) if ratio <= 1 else (math.floor(height / ratio), math.floor(width / ratio))
        if min(reduced) < 1:
            raise ImageError(
                f"image: expected a shorter side of at least a pixel when the longer one has {self.longest_edge}, got"
                f" {width}x{height} pixels; crop it"
            )
        rows, columns = (-(-side // self.token_size) for side in reduced)
        return rows, columns

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return the sizes of a few square images, ascending; the last one is enough for every image."""
        most = -(-self.longest_edge // self.token_size)
        counts = processing.few_counts([side**2 for side in range(1, most + 1)])[-_MOST_PROFILES:]
        wanted = [count for count in counts if count >= _FEWEST_TOKENS] or counts[-1:]
        return tuple(self.whole_sizes(1, count) for count in wanted)

    def family_inputs(self, patches: Patches, room: dict[str, int]) -> dict[str, NDArray[Any]]:
        """Return ``token_index``; arguments are those of ``GridImages.family_inputs``."""
        return {io.TOKEN_INDEX: processing.padded_index(patches.order, room["N"])}

    def layout(self, width: int, height: int) -> processing.ImageLayout:
        """Return the layout of an image; each row of tokens is a run of the prompt."""
        rows, columns = grid = self.token_grid(width, height)
        return replace(
            self.grid_layout(width, height, grid),
            run_lengths=(columns,) * rows,
            text=("", *(self.break_mark,) * (rows - 1), self.end_mark),
            positions=None,
            position_span=0,
        )
