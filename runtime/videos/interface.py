"""From a video to the vision graph's inputs: one run of the graph for each pair of frames.

The vision encoders of Qwen2.5-VL and Qwen3-VL attend within a pair of frames only, so a video of T frames is T / 2 *units*
(the last frame of an odd number stands for two). Each is one run of the same graph as an image, whose patches hold both frames:

    videos = video_processing(manifest.video_processing, images=images)
    video = open_video("clip.mp4", videos.sampling, fps=2)
    for unit, layout in enumerate(videos.layouts(video)):     # what the prompt says, positions, sizes
        inputs = videos.prepare(video, unit, profile.sizes)   # padded to a profile

The layouts stand in the prompt, in order, in place of ONE video placeholder (``<|video_pad|>``). The marks of the chat template
around it (``<|vision_start|>``, ``<|vision_end|>``) stay, with both families.

- ``layout.text``: what stands before and after the unit's visual tokens.
- ``layout.positions``: from the start of the video with Qwen2.5-VL, where all units but the last have ``position_span`` 0; the
  last one's is the larger side of the grid, whatever the time. From the start of the unit with Qwen3-VL.
- The answer's first token goes to the largest position of the whole prompt, plus 1. With Qwen2.5-VL that can be the time of
  a long video, which reaches beyond the text after it.

Letters: N visual tokens of a unit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, final

import msgspec

from trio_edge.runtime.bundle.errors import ManifestError
from trio_edge.runtime.images.patches import scaled_grid
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages
from trio_edge.runtime.videos.qwen import KIND, TIMESTAMPS_KIND, Qwen3Videos, Qwen25Videos

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.images.layout import ImageLayout
    from trio_edge.runtime.videos.reading import Video

_PIXELS = ("resample", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")


@final
class VideoProcessing:
    """A bundle's video processing."""

    def __init__(self, sampling: Qwen25Videos | Qwen3Videos, images: QwenImages | Qwen3Images) -> None:
        """Take the constants of videos, and the images' processing, which has the encoder's."""
        self.sampling: Qwen25Videos | Qwen3Videos = sampling
        self._frames = msgspec.structs.replace(images, **{key: getattr(sampling, key) for key in _PIXELS})

    def grid(self, video: Video) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of each unit.

        They are Hugging Face's, unless the vision graph has no room for so many (``max_pixels`` of images): then frames are
        reduced as images are.

        Raises:
            ImageError: If the frames are too thin, or too few.
        """
        return self._grid(len(video.indices), *video.size)

    def sizes(self, num_frames: int, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the vision graph's axes that each unit of a video needs, N included.

        Raises:
            ImageError: If the frames are too thin, or too few.
        """
        grid = self._grid(num_frames, width, height)
        return dict(self._frames.grid_layout(width, height, grid).sizes)

    def _grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        frames = self._frames
        rows, columns = self.sampling.grid(num_frames, width, height, size=frames.token_size)
        if rows * columns * frames.token_size**2 <= frames.max_pixels:
            return rows, columns
        return scaled_grid(width, height, size=frames.token_size, least=1, most=frames.max_pixels)

    def layouts(self, video: Video) -> tuple[ImageLayout, ...]:
        """Return the layout of each unit.

        Raises:
            ImageError: If the frames are too thin, or too few.
        """
        sampling, grid = self.sampling, self.grid(video)
        times = sampling.times(video.indices, video.total, video.fps)
        texts = sampling.texts(video.indices, video.fps)
        whole = self._frames.grid_layout(*video.size, grid)
        is_one = isinstance(
            sampling, Qwen25Videos
        )  # one run of positions, where Qwen3-VL has one for each unit
        layouts = []
        for unit, (time, text) in enumerate(zip(times, texts)):
            assert whole.positions is not None
            positions = whole.positions.copy()
            positions[0] = time
            span = whole.position_span if not is_one or unit == len(texts) - 1 else 0
            layouts.append(replace(whole, positions=positions, position_span=span, text=text))
        return tuple(layouts)

    def prepare(
        self, video: Video, unit: int, sizes: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[Any]]:
        """Return the vision graph's inputs of one unit, by name.

        Args:
            video: As ``open_video`` returns it.
            unit: From 0.
            sizes: What the graph's axes have, which the inputs are padded to; the unit's own for those that are missing.

        Raises:
            ImageError: If the frames need more than ``sizes``, or are too thin or too few.
        """
        return self._frames.prepare_frames(video.frames[2 * unit : 2 * unit + 2], self.grid(video), sizes)


def video_processing(values: Mapping[str, Any], *, images: ImageProcessing) -> VideoProcessing:
    """Return the processing whose constants ``to_dict`` of ``Qwen25Videos`` or ``Qwen3Videos`` wrote.

    Args:
        values: The manifest's ``video_processing``.
        images: The bundle's image processing.

    Raises:
        ManifestError: If it is of an unknown kind or does not belong to ``images``, or a value breaks a rule.
    """
    kind, frames = values.get("kind"), getattr(images, "temporal_patch_size", 2)
    if frames != 2:
        raise ManifestError(f"video_processing: expected patches of 2 frames, got {frames}")
    if kind == KIND and isinstance(images, QwenImages):
        return VideoProcessing(Qwen25Videos.from_dict(values), images)
    if kind == TIMESTAMPS_KIND and isinstance(images, Qwen3Images):
        return VideoProcessing(Qwen3Videos.from_dict(values), images)
    raise ManifestError(
        f"video_processing kind: expected {KIND!r} or {TIMESTAMPS_KIND!r} with the images of the same family, got {kind!r}"
        f" with {type(images).__name__}; export the bundle again"
    )
