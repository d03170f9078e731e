"""From a video to the vision graph's inputs: one run of the graph for each pair of frames.

The vision encoders of Qwen2.5-VL and Qwen3-VL attend only within a pair of frames, so a video of T frames has T / 2 *units*
(the last frame of an odd number is repeated). Each unit is one run of the images' graph, whose patches hold both frames:

    videos = video_processing(manifest.video_processing, images=images)
    video = open_video("clip.mp4", videos.sampling, fps=2)
    for unit, layout in enumerate(videos.layouts(video)):     # what the prompt says, positions, sizes
        inputs = videos.prepare(video, unit, profile.sizes)   # padded to a profile

The layouts in order replace ONE video placeholder (``<|video_pad|>``) in the prompt. With both families, the chat template's
marks around it (``<|vision_start|>``, ``<|vision_end|>``) stay.

- ``layout.text``: the text before and after the unit's visual tokens.
- ``layout.positions``: with Qwen2.5-VL, from the start of the video; all units have ``position_span`` 0 except the last,
  which has the larger side of the grid, whatever the time. With Qwen3-VL, from the start of the unit.
- The answer's first token has the largest position of the whole prompt plus 1. With Qwen2.5-VL, this can be the time of a
  long video, which exceeds the positions of the text after it.

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
        """Combine the videos' constants with the encoder's constants in ``images``."""
        self.sampling: Qwen25Videos | Qwen3Videos = sampling
        self._frames = msgspec.structs.replace(images, **{key: getattr(sampling, key) for key in _PIXELS})

    def grid(self, video: Video) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of each unit.

        They are Hugging Face's, unless the vision graph is too small (``max_pixels`` of images). Then frames are reduced like
        images.

        Raises:
            ImageError: If the frames are too thin, or too few.
        """
        return self._grid(len(video.indices), *video.size)

    def sizes(self, num_frames: int, width: int, height: int) -> dict[str, int]:
        """Return the sizes of the vision graph's axes for each unit of a video, including N.

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
        is_one = isinstance(sampling, Qwen25Videos)  # one run of positions; Qwen3-VL has one per unit
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
        """Return the vision graph's inputs for unit ``unit``, from 0, by name.

        They are padded to ``sizes``, the sizes of the graph's axes; missing axes get the unit's own size.

        Raises:
            ImageError: If the frames exceed ``sizes``, or are too thin or too few.
        """
        return self._frames.prepare_frames(video.frames[2 * unit : 2 * unit + 2], self.grid(video), sizes)


def video_processing(values: Mapping[str, Any], *, images: ImageProcessing) -> VideoProcessing:
    """Return the processing for ``values``, which ``Qwen25Videos.to_dict`` or ``Qwen3Videos.to_dict`` wrote.

    Raises:
        ManifestError: If it is of an unknown kind or does not fit ``images``, or a value is out of range.
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
