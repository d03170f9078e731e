"""The interface from an image to the vision graph's inputs: sizes first, then arrays padded to a profile.

The exporter and the pipeline know only ``ImageProcessing``. Its kinds are tiles with newlines (LLaVA), patches in windows
(Qwen2.5-VL) or without windows (Qwen3-VL), a grid of tiles with a thumbnail (InternVL), such a grid with text between
the tiles (SmolVLM2), patches with text between the rows (Ministral 3), tiles of any shape (LFM2-VL), and slices after an
overview (MiniCPM-V).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.minicpm import MiniCpmImages
from trio_edge.runtime.images.naflex import NaflexImages
from trio_edge.runtime.images.pixtral import PixtralImages
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.images.tiles import InternVlImages, SmolVlmImages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.bundle.manifest import Profile
    from trio_edge.runtime.images.processing import ImageLayout


class ImageProcessing(Protocol):
    """A bundle's image processing."""

    @property
    def encoder_keep(self) -> int | None:
        """Patches per tile, or visual tokens per image, that the vision graph keeps; None for all."""

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON types, with "kind"."""

    def of_several(self) -> ImageProcessing:
        """Return the processing for a prompt with several images, if it differs; else itself."""

    def at_base(self) -> ImageProcessing | None:
        """Return the processing that makes only the tile with the whole image; None if there are no other tiles."""

    def at_low(self) -> ImageProcessing:
        """Return the processing of a quick look: the tile with the whole image, or a quarter of the most pixels."""

    def within(self, width: int, height: int) -> ImageProcessing | None:
        """Return the processing that scales images into this size in pixels; None if that is impossible."""

    def sizes(self, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the vision graph's axes for an image, including N, its visual tokens.

        Raises:
            ImageError: If the image is empty, or cannot be processed.
        """

    def any_image_sizes(self) -> tuple[dict[str, int], ...]:
        """Return sizes, ascending, that together have room for every image."""

    def layout(self, width: int, height: int) -> ImageLayout:
        """Return the layout of an image of this size; errors are those of ``sizes``."""

    def prepare(self, image: Image.Image, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs by name.

        Args:
            image: An RGB image, as ``open_image`` returns it.
            sizes: Sizes of the graph's axes to pad to; missing axes get the image's own size.

        Raises:
            ImageError: If the image is not RGB, cannot be processed, or is larger than ``sizes``.
        """


def at_form(images: ImageProcessing, form: str) -> ImageProcessing:
    """Return the processing of a level's image form: "base", "low" or "WIDTHxHEIGHT".

    Raises:
        ScheduleError: If it is something else, or the model's images have no such form.
    """
    if form == "low":
        return images.at_low()
    if form == "base":
        if (found := images.at_base()) is None:
            raise ScheduleError(
                "--level: expected a model with a base tile and others for @base, got one without; give @WIDTHxHEIGHT, or no form"
            )
        return found
    if (match := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", form)) is None:
        raise ScheduleError(
            f"--level: expected @base, @low or @WIDTHxHEIGHT in pixels, got @{form}; write it as @640x480"
        )
    if (found := images.within(int(match[1]), int(match[2]))) is None:
        raise ScheduleError(
            f"--level: expected an image form that the model's images can have, got @{form}; give a larger one, or none"
        )
    return found


def image_processing(
    values: Mapping[str, Any], *, encoder_keep: int | None, profiles: Sequence[Profile] = ()
) -> ImageProcessing:
    """Return the processing that ``ImageProcessing.to_dict`` wrote; ``profiles`` are those of the vision graph.

    Raises:
        ManifestError: If it is of an unknown kind, a value is out of range, or a profile larger than an image can need.
    """
    others = (
        QwenImages,
        Qwen3Images,
        InternVlImages,
        SmolVlmImages,
        PixtralImages,
        NaflexImages,
        MiniCpmImages,
    )
    kind = values.get("kind")
    family = next((family for family in others if family.__struct_config__.tag == kind), LlavaImages)
    if encoder_keep is not None and family not in (QwenImages, LlavaImages):
        raise ManifestError(
            f"encoder_keep: expected none with kind {kind!r}, got {encoder_keep}; export the bundle again"
        )
    images = family.from_dict(values, encoder_keep=encoder_keep)
    largest = images.any_image_sizes() if profiles else ()
    for axis, size in (pair for profile in profiles for pair in profile.sizes.items()):
        if size > (most := max(sizes.get(axis, size) for sizes in largest)):
            raise ManifestError(
                f"graph 'vision': expected profiles with {axis} <= {most}, the most of an image, got {size};"
                " export the bundle again"
            )
    return images
