"""From a video to the vision graph's inputs for Qwen2.5-VL and Qwen3-VL: one run of the graph for each pair of frames.

The vision encoders attend only within a pair of frames, so a video of T frames has T / 2 *units* (the last frame of an odd
number is repeated). Each unit is one run of the images' graph, whose patches hold both frames:

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

Frames, sizes and times are the same as in the Hugging Face classes:

|                               | Qwen2.5-VL            | Qwen3-VL                 |
|-------------------------------|-----------------------|--------------------------|
| frames unless asked otherwise | all                   | two per second           |
| limits on pixels              | for each frame        | for all frames together  |
| time of a pair of frames      | a position of M-RoPE  | text before the pair     |

Source: Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor and Qwen2_5_VLModel.get_rope_index
of transformers 5.23.
Letters: N visual tokens of a unit.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.images import processing
from trio_edge.runtime.images.qwen import Qwen3Images, QwenImages, areas, check_aspect_ratio, scaled_grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.images.interface import ImageProcessing
    from trio_edge.runtime.images.processing import ImageLayout
    from trio_edge.runtime.images.qwen import PatchImages
    from trio_edge.runtime.videos.reading import Video

UNKNOWN_FPS = 24.0
"""Frames per second of a video with unknown rate."""

_FILE = "video_preprocessor_config"
_VALUES = ("min_frames", "max_frames", "do_sample_frames", "cap_pixels_per_frame", "max_video_tokens")
_REQUESTS = ("fps", "num_frames")
_HALF = (0.5, 0.5, 0.5)
_MOST_TIME = 1 << 24  # float32 holds all whole numbers below it
_Videos = TypeVar("_Videos", bound="QwenVideos")


class QwenVideos(processing.Processing, frozen=True, kw_only=True):
    """Constants of both families: the manifest's ``video_processing``. Sizes are in pixels of scaled frames."""

    manifest_key = "video_processing"
    processor: ClassVar[str]
    """Hugging Face's class."""
    old_sizes: ClassVar[bool]
    """Whether that class reads ``min_pixels`` and ``max_pixels``, which precede ``size``."""

    min_pixels: processing.Size
    """Smaller videos are enlarged."""
    max_pixels: processing.Size
    """Larger videos are reduced."""
    max_video_tokens: processing.Size
    """Limit of visual tokens with ``cap_pixels_per_frame``."""
    cap_pixels_per_frame: bool = False
    min_frames: processing.Size = 4
    """Fewest frames that sampling by ``fps`` takes, if the video has as many."""
    max_frames: processing.Size = 768
    """Most frames that sampling by ``fps`` takes."""
    do_sample_frames: bool = False
    """Whether frames are sampled by default, by ``num_frames`` or ``fps``."""
    fps: processing.Factor | None = None
    num_frames: processing.Size | None = None

    def __post_init__(self) -> None:
        for least, most in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            if getattr(self, least) > getattr(self, most):
                raise ManifestError(
                    f"video_processing {least}: expected <= {most} {getattr(self, most)}, got {getattr(self, least)}"
                )

    @classmethod
    def from_preprocessor_config(
        cls: type[_Videos], config: Mapping[str, Any], *, images: PatchImages, **tower: float
    ) -> _Videos:
        """Return the constants of a ``video_preprocessor_config.json``, or else of a ``preprocessor_config.json``.

        Missing keys have the defaults of Hugging Face's class. ``images`` is the checkpoint's image processing; ``tower``
        are fields that only the vision encoder's configuration has.

        Raises:
            CheckpointError: If the processor is of another class, or a value is not supported.
        """
        name = config.get("video_processor_type") or cls.processor
        if name != cls.processor:
            raise CheckpointError(f"{_FILE} video_processor_type: expected {cls.processor}, got {name!r}")
        values = {key: value for key, value in config.items() if value is not None}
        for key in ("do_convert_rgb", "do_resize"):
            if not values.get(key, True):
                raise CheckpointError(f"{_FILE} {key}: expected true, got false")
        for key in ("patch_size", "temporal_patch_size", "merge_size"):
            if values.get(key, getattr(images, key)) != getattr(images, key):
                raise CheckpointError(
                    f"{_FILE} {key}: expected {getattr(images, key)} (the image processor's), got {values[key]}"
                )
        with processing.only_checkpoint_errors(_FILE):
            fields = processing.pixel_fields(values, *_VALUES) | tower
            fields |= areas(values, file=_FILE, old_keys=cls.old_sizes)
            # null is different from the default: it switches off sampling by this number.
            fields |= {key: config[key] for key in _REQUESTS if key in config}
            return msgspec.convert({"kind": cls.__struct_config__.tag, **fields}, cls, strict=True)

    def request(self, fps: float | None, num_frames: int | None) -> tuple[float | None, int | None]:
        """Return the frames per second or the number of frames to sample; two None for the default of the class."""
        if fps is not None or num_frames is not None or not self.do_sample_frames:
            return fps, num_frames
        return self.fps, self.num_frames


@final
class Qwen25Videos(QwenVideos, frozen=True, kw_only=True, tag_field="kind", tag="frames_at_positions"):
    """Videos of Qwen2.5-VL: the time of a pair of frames is in its tokens' positions."""

    processor = "Qwen2VLVideoProcessor"
    old_sizes = True

    tokens_per_second: processing.Factor
    """Positions per second."""
    min_pixels: processing.Size = 128 * 28 * 28
    max_pixels: processing.Size = 768 * 28 * 28
    max_video_tokens: processing.Size = 128_000
    """Visual tokens per video; ``cap_pixels_per_frame`` allows nine tenths of them."""

    def indices(
        self, total: int, video_fps: float | None, *, fps: float | None, num_frames: int | None
    ) -> Sequence[int]:
        """Return the frames to take of ``total``, see ``Sampling``.

        Hugging Face's class sometimes takes one frame more than the video has; this frame is left out.
        """
        fps, num_frames = self.request(fps, num_frames)
        if num_frames is not None:
            count = round(num_frames / 2) * 2
        elif fps is not None:
            count = self._count_at(fps, total, video_fps)
        else:
            return range(total)
        if not 0 < count <= total:
            too_few, wanted = count < 1 < total, max(count, 2)
            advice = "2 or more with num_frames" if too_few else "fewer, or ask about it as an image"
            raise ImageError(
                f"video: expected {wanted} frames to take, got a video of {total}; take {advice}"
            )
        # float32, like torch.arange: in float64 a product just below a whole number would be rounded down
        places = (np.arange(count) * (total / count)).astype(np.float32)
        return [int(place) for place in places]

    def _count_at(self, fps: float, total: int, video_fps: float | None) -> int:
        if video_fps is None:
            raise ImageError(
                "video: expected its frames per second to sample by fps, got none; give source_fps or num_frames"
            )
        most = min(self.max_frames, total) // 2 * 2
        return math.floor(min(max(total / video_fps * fps, self.min_frames), most) / 2) * 2

    def grid(self, num_frames: int, width: int, height: int, *, size: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of a pair of frames of ``width`` x ``height`` pixels.

        ``num_frames`` are sampled; ``size`` is the side of a visual token in pixels of the scaled frame.

        Raises:
            ImageError: If the frames are too thin.
        """
        check_aspect_ratio(width, height)
        most = self.max_pixels
        if self.cap_pixels_per_frame:
            shared = int(self.max_video_tokens * size**2 * 0.9) * 2 // num_frames
            most = max(min(most, shared), int(self.min_pixels * 1.05))
        return scaled_grid(width, height, size=size, least=self.min_pixels, most=most)

    def times(self, indices: Sequence[int], total: int, video_fps: float | None) -> NDArray[np.int32]:
        """Return the time position of each pair of frames, [units], from 0."""
        taken_fps = UNKNOWN_FPS if video_fps is None else len(indices) / total * video_fps
        # float32, like the model's tensors
        interval = np.float32(self.tokens_per_second) * np.float32(2 / taken_fps)
        times = np.arange(-(-len(indices) // 2), dtype=np.float32) * interval
        if not times[-1] < _MOST_TIME:
            raise ImageError(
                f"video: expected a time below position {_MOST_TIME}, got {times[-1]:.0f} at {taken_fps:.3g} frames a second;"
                " give a shorter video"
            )
        return times.astype(np.int32)

    def texts(self, indices: Sequence[int], video_fps: float | None) -> list[tuple[str, str]]:
        """Return the text before and after each pair of frames: none."""
        return [("", "")] * -(-len(indices) // 2)


@final
class Qwen3Videos(QwenVideos, frozen=True, kw_only=True, tag_field="kind", tag="frames_after_timestamps"):
    """Videos of Qwen3-VL: the prompt has the time as text before each pair of frames."""

    processor = "Qwen3VLVideoProcessor"
    old_sizes = False

    min_pixels: processing.Size = 128 * 32 * 32
    """Fewest pixels of all frames together."""
    max_pixels: processing.Size = 768 * 32 * 32
    """Most pixels of all frames together."""
    max_video_tokens: processing.Size = 768
    """Visual tokens per frame that ``cap_pixels_per_frame`` allows."""
    do_sample_frames: bool = True
    fps: processing.Factor | None = 2.0
    image_mean: processing.Colour = _HALF
    image_std: processing.Spread = _HALF

    def indices(
        self, total: int, video_fps: float | None, *, fps: float | None, num_frames: int | None
    ) -> Sequence[int]:
        """Return the frames to take of ``total``, see ``Sampling``."""
        asked = fps is not None or num_frames is not None
        if not asked and not self.do_sample_frames:
            return range(total)
        fps, num_frames = self.request(fps, num_frames)
        if num_frames is None:
            wanted = total if fps is None else int(total / (video_fps or UNKNOWN_FPS) * fps)
            num_frames = min(max(wanted, self.min_frames), self.max_frames)
            num_frames = num_frames if fps is None else min(num_frames, total)
        return [int(place) for place in np.linspace(0, total - 1, num_frames).round()]

    def grid(self, num_frames: int, width: int, height: int, *, size: int) -> tuple[int, int]:
        """Return the rows and columns of visual tokens of a pair of frames; arguments as ``Qwen25Videos.grid``.

        Raises:
            ImageError: If the frames are too thin, or there is only one.
        """
        if num_frames < 2:
            raise ImageError("video: expected at least 2 frames, got 1; ask about it as an image")
        if min(width, height) < size:
            scale = max(size / height, size / width)
            width, height = int(width * scale), int(height * scale)
        check_aspect_ratio(width, height)
        most = self.max_pixels
        if self.cap_pixels_per_frame:
            shared = min(self.max_video_tokens * size**2, self.max_pixels // num_frames)
            most = max(shared, int(self.min_pixels * 1.05)) * num_frames
        return scaled_grid(width, height, size=size, least=self.min_pixels, most=most, num_frames=num_frames)

    def times(self, indices: Sequence[int], total: int, video_fps: float | None) -> NDArray[np.int32]:
        """Return the time position of each pair of frames, [units]: 0, because text precedes each pair."""
        return np.zeros(-(-len(indices) // 2), np.int32)

    def texts(self, indices: Sequence[int], video_fps: float | None) -> list[tuple[str, str]]:
        """Return the text before and after each pair of frames: its time, and the vision marks."""
        fps = UNKNOWN_FPS if video_fps is None else video_fps
        seconds = [index / fps for index in (*indices, indices[-1])]
        middles = [(first + last) / 2 for first, last in zip(seconds[0:-1:2], seconds[1::2])]
        return [(f"<{middle:.1f} seconds><|vision_start|>", "<|vision_end|>") for middle in middles]


@final
class VideoProcessing:
    """A bundle's video processing."""

    def __init__(self, sampling: Qwen25Videos | Qwen3Videos, images: QwenImages | Qwen3Images) -> None:
        """Combine the videos' constants with the encoder's constants in ``images``."""
        self.sampling: Qwen25Videos | Qwen3Videos = sampling
        self._frames = msgspec.structs.replace(
            images, **{key: getattr(sampling, key) for key in processing.Processing.__struct_fields__}
        )

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
    tags = []
    for sampling, family in ((Qwen25Videos, QwenImages), (Qwen3Videos, Qwen3Images)):
        if kind == sampling.__struct_config__.tag and isinstance(images, family):
            return VideoProcessing(sampling.from_dict(values), images)
        tags.append(repr(sampling.__struct_config__.tag))
    raise ManifestError(
        f"video_processing kind: expected {' or '.join(tags)} with the images of the same family, got {kind!r}"
        f" with {type(images).__name__}; export the bundle again"
    )
