"""Drawings of the visual tokens that each selection stage kept: one panel per stage, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from trio_edge.runtime.bundle.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.images.processing import ImageLayout

_PANEL_SIDE = 640  # three panels fit on a screen
_MARGIN = 16
_CAPTION_HEIGHT = 56
_PAPER = (250, 250, 248)
_INK = (32, 34, 38)
_FAINT_INK = (110, 114, 120)
_BASE_COLOUR = (255, 153, 0)
_BASE_INK = (196, 110, 0)


def draw_all(
    images: Sequence[Image.Image],
    layouts: Sequence[ImageLayout],
    kept: Sequence[NDArray[np.integer]],
    *,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Return the drawings of ``draw_kept`` for all images, one below the other.

    Args:
        images: At least one RGB image.
        layouts: Layouts of the images.
        kept: For each stage, indices of its kept tokens among the tokens of all images.
        captions: For each stage, a title.

    Raises:
        ShapeError: If the arrays do not fit each other.
    """
    sheets, first = [], 0
    for image, layout in zip(images, layouts):
        after = first + len(layout.boxes)
        own = [indices[(indices >= first) & (indices < after)] - first for indices in kept]
        sheets.append(draw_kept(image, layout.boxes, own, captions=captions, overview=layout.overview))
        first = after
    size = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    drawing, y = Image.new("RGB", size, _PAPER), 0
    for sheet in sheets:
        drawing.paste(sheet, (0, y))
        y += sheet.height
    return drawing


def draw_kept(
    image: Image.Image,
    boxes: NDArray[np.float32],
    kept: Sequence[NDArray[np.integer]],
    *,
    captions: Sequence[str] = (),
    overview: Sequence[int] = (),
) -> Image.Image:
    """Return the RGB image once per stage, with the tokens that the stage kept.

    Kept patches of the grid, or of the only tile, stay bright; the rest is dark and grey. Kept patches of the tile that
    shows the whole image (LLaVA-NeXT's base tile, InternVL's thumbnail) are orange outlines, because they cover the same
    places. Newline tokens cannot be drawn, but count in the caption.

    Args:
        image: The image.
        boxes: [N, 4], from the image's layout.
        kept: For each stage, indices of its kept tokens among the N original tokens.
        captions: For each stage, a title such as "layer 5".
        overview: Tokens of the tile that shows the whole image, from the image's layout.

    Raises:
        ShapeError: If the arrays do not fit each other.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ShapeError(f"boxes: expected [N, 4], got {list(boxes.shape)}")
    if captions and len(captions) != len(kept):
        raise ShapeError(f"captions: expected one for each of {len(kept)} stages, got {len(captions)}")
    for indices in kept:
        lowest, highest = (int(indices.min()), int(indices.max())) if len(indices) else (0, -1)
        if lowest < 0 or highest >= len(boxes):
            raise ShapeError(f"kept: expected indices in 0..{len(boxes) - 1}, got {lowest}..{highest}")
    stages = list(kept) or [np.arange(len(boxes))]
    titles = list(captions) or [f"stage {i + 1}" for i in range(len(kept))] or ["no selection"]
    legend = "orange outlines: overview tile" if len(overview) else ""
    panels = []
    for indices, title in zip(stages, titles):
        drawn = _drawn(image, boxes, indices, outlined=np.isin(indices, overview))
        panels.append(_captioned(drawn, title, f"{len(indices)} of {len(boxes)} visual tokens kept", legend))
    width = sum(panel.width for panel in panels) + _MARGIN * (len(panels) + 1)
    sheet = Image.new("RGB", (width, panels[0].height + 2 * _MARGIN), _PAPER)
    x = _MARGIN
    for panel in panels:
        sheet.paste(panel, (x, _MARGIN))
        x += panel.width + _MARGIN
    return sheet


def _drawn(
    image: Image.Image,
    boxes: NDArray[np.float32],
    indices: NDArray[np.integer],
    *,
    outlined: NDArray[np.bool_],
) -> Image.Image:
    """Return the image with the patches at ``indices`` bright, or as outlines where ``outlined``."""
    scale = _PANEL_SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    bright = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    # One mask for all patches, because compositing once is faster than pasting hundreds of boxes.
    mask = Image.new("L", size, 0)
    mask_draw = ImageDraw.Draw(mask)
    for box in _pixel_boxes(boxes[indices[~outlined]], scale):
        mask_draw.rectangle(box, fill=255)
    dark = ImageEnhance.Brightness(ImageEnhance.Color(bright).enhance(0.2)).enhance(0.36)
    drawn = Image.composite(bright, dark, mask)
    draw = ImageDraw.Draw(drawn)
    # Inset, so that neighbours stay apart.
    for x0, y0, x1, y1 in _pixel_boxes(boxes[indices[outlined]], scale):
        draw.rectangle((x0 + 1, y0 + 1, max(x0 + 1, x1 - 1), max(y0 + 1, y1 - 1)), outline=_BASE_COLOUR)
    return drawn


def _pixel_boxes(boxes: NDArray[np.float32], scale: float) -> list[tuple[int, int, int, int]]:
    """Return inclusive pixel corners, except for newlines and padding, which have no area."""
    with_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])  # false for NaN
    corners = np.rint(boxes[with_area] * scale).astype(int)
    return [(x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)) for x0, y0, x1, y1 in corners.tolist()]


def _captioned(drawn: Image.Image, title: str, count: str, legend: str) -> Image.Image:
    lines = (
        (0, title, _INK, ImageFont.load_default(20)),
        (27, count, _FAINT_INK, ImageFont.load_default(15)),
    )
    width = max(drawn.width, *(int(font.getlength(text)) + 8 for _, text, _, font in lines))
    panel = Image.new("RGB", (width, drawn.height + _CAPTION_HEIGHT), _PAPER)
    panel.paste(drawn, ((width - drawn.width) // 2, _CAPTION_HEIGHT))
    draw = ImageDraw.Draw(panel)
    for y, text, ink, font in lines:
        draw.text((0, y), text, fill=ink, font=font)
    legend_width = int(font.getlength(legend))
    if legend and font.getlength(count) + legend_width + 24 <= width:
        draw.text((width - legend_width, 27), legend, fill=_BASE_INK, font=font)
    return panel
