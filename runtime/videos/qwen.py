"""Frames, sizes and times of videos with Qwen2.5-VL and Qwen3-VL, the same as in their Hugging Face classes.

|                               | Qwen2.5-VL            | Qwen3-VL                 |
|-------------------------------|-----------------------|--------------------------|
| frames unless asked otherwise | all                   | two per second           |
| limits on pixels              | for each frame        | for all frames together  |
| time of a pair of frames      | a position of M-RoPE  | text before the pair     |

Source: Qwen2VLVideoProcessor, Qwen3VLVideoProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor and Qwen2_5_VLModel.get_rope_index
of transformers 5.23.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, final

import msgspec
import numpy as np

from trio_edge.runtime.bundle.errors import CheckpointError, ImageError, ManifestError
from trio_edge.runtime.bundle.limits import typed
from trio_edge.runtime.images.constants import (
    CLIP_MEAN,
    CLIP_STD,
    Colour,
    Factor,
    Size,
    Spread,
    only_checkpoint_errors,
    pixel_fields,
)
from trio_edge.runtime.images.patches import check_aspect_ratio, scaled_grid
from trio_edge.runtime.images.resizing import Resample  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.images.patches import PatchImages

KIND, TIMESTAMPS_KIND = "frames_at_positions", "frames_after_timestamps"
UNKNOWN_FPS = 24.0
"""Frames per second of a video with unknown rate."""

_FILE = "video_preprocessor_config"
_VALUES = ("min_frames", "max_frames", "do_sample_frames", "cap_pixels_per_frame", "max_video_tokens")
_REQUESTS = ("fps", "num_frames")
_Videos = TypeVar("_Videos", bound="QwenVideos")


class QwenVideos(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constants of both families: the manifest's ``video_processing``. Sizes are in pixels of scaled frames."""

    processor: ClassVar[str]
    """Hugging Face's class."""
    old_sizes: ClassVar[bool]
    """Whether that class reads ``min_pixels`` and ``max_pixels``, which precede ``size``."""

    min_pixels: Size
    """Smaller videos are enlarged."""
    max_pixels: Size
    """Larger videos are reduced."""
    max_video_tokens: Size
    """Limit of visual tokens with ``cap_pixels_per_frame``."""
    cap_pixels_per_frame: bool = False
    min_frames: Size = 4
    """Fewest frames that sampling by ``fps`` takes, if the video has as many."""
    max_frames: Size = 768
    """Most frames that sampling by ``fps`` takes."""
    do_sample_frames: bool = False
    """Whether frames are sampled by default, by ``num_frames`` or ``fps``."""
    fps: Factor | None = None
    num_frames: Size | None = None
    resample: Resample = "bicubic"
    do_rescale: bool = True
    do_normalize: bool = True
    rescale_factor: Factor = 1 / 255
    image_mean: Colour = CLIP_MEAN
    image_std: Spread = CLIP_STD

    def __post_init__(self) -> None:
        for least, most in (("min_pixels", "max_pixels"), ("min_frames", "max_frames")):
            if getattr(self, least) > getattr(self, most):
                raise ManifestError(
                    f"video_processing {least}: expected <= {most} {getattr(self, most)}, got {getattr(self, least)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the constants as JSON types, with "kind"."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values

    @classmethod
    def from_dict(cls: type[_Videos], values: Mapping[str, Any]) -> _Videos:
        """Return what ``to_dict`` wrote.

        Raises:
            ManifestError: If it is of another kind, a key is unknown or missing, or a value is out of range.
        """
        try:
            return typed(dict(values), cls)
        except msgspec.ValidationError as error:
            raise ManifestError(f"video_processing: {error}") from None

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
        with only_checkpoint_errors(_FILE):
            fields = pixel_fields(values, *_VALUES) | _areas(values, old=cls.old_sizes) | tower
            # null is different from the default: it switches off sampling by this number.
            fields |= {key: config[key] for key in _REQUESTS if key in config}
            return msgspec.convert({"kind": cls.__struct_config__.tag, **fields}, cls, strict=True)

    def request(self, fps: float | None, num_frames: int | None) -> tuple[float | None, int | None]:
        """Return the frames per second or the number of frames to sample; two None for the default of the class."""
        if fps is not None or num_frames is not None or not self.do_sample_frames:
            return fps, num_frames
        return self.fps, self.num_frames


@final
class Qwen25Videos(QwenVideos, frozen=True, kw_only=True, tag_field="kind", tag=KIND):
    """Videos of Qwen2.5-VL: the time of a pair of frames is in its tokens' positions."""

    processor = "Qwen2VLVideoProcessor"
    old_sizes = True

    tokens_per_second: Factor
    """Positions per second."""
    min_pixels: Size = 128 * 28 * 28
    max_pixels: Size = 768 * 28 * 28
    max_video_tokens: Size = 128_000
    """Visual tokens per video; ``cap_pixels_per_frame`` allows nine tenths of them."""

    def indices(
        self, total: int, video_fps: float | None, *, fps: float | None, num_frames: int | None
    ) -> list[int]:
        """Return the frames to take of ``total``, see ``Sampling``.

        Hugging Face's class sometimes takes one frame more than the video has; this frame is left out.
        """
        fps, num_frames = self.request(fps, num_frames)
        if num_frames is not None:
            count = round(num_frames / 2) * 2
        elif fps is not None:
            count = self._count_at(fps, total, video_fps)
        else:
            return list(range(total))
        if not 0 < count <= total:
            advice = (
                "2 or more with num_frames" if count < 1 < total else "fewer, or ask about it as an image"
            )
            raise ImageError(
                f"video: expected {max(count, 2)} frames to take, got a video of {total}; take {advice}"
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
        return (np.arange(-(-len(indices) // 2), dtype=np.float32) * interval).astype(np.int32)

    def texts(self, indices: Sequence[int], video_fps: float | None) -> list[tuple[str, str]]:
        """Return the text before and after each pair of frames: none."""
        return [("", "")] * -(-len(indices) // 2)


@final
class Qwen3Videos(QwenVideos, frozen=True, kw_only=True, tag_field="kind", tag=TIMESTAMPS_KIND):
    """Videos of Qwen3-VL: the prompt has the time as text before each pair of frames."""

    processor = "Qwen3VLVideoProcessor"
    old_sizes = False

    min_pixels: Size = 128 * 32 * 32
    """Fewest pixels of all frames together."""
    max_pixels: Size = 768 * 32 * 32
    """Most pixels of all frames together."""
    max_video_tokens: Size = 768
    """Visual tokens per frame that ``cap_pixels_per_frame`` allows."""
    do_sample_frames: bool = True
    fps: Factor | None = 2.0
    image_mean: Colour = (0.5, 0.5, 0.5)
    image_std: Spread = (0.5, 0.5, 0.5)

    def indices(
        self, total: int, video_fps: float | None, *, fps: float | None, num_frames: int | None
    ) -> list[int]:
        """Return the frames to take of ``total``, see ``Sampling``."""
        asked = fps is not None or num_frames is not None
        if not asked and not self.do_sample_frames:
            return list(range(total))
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
        return _grid_in_time(width, height, num_frames, size=size, least=self.min_pixels, most=most)

    def times(self, indices: Sequence[int], total: int, video_fps: float | None) -> NDArray[np.int32]:
        """Return the time position of each pair of frames, [units]: 0, because text precedes each pair."""
        return np.zeros(-(-len(indices) // 2), np.int32)

    def texts(self, indices: Sequence[int], video_fps: float | None) -> list[tuple[str, str]]:
        """Return the text before and after each pair of frames: its time, and the vision marks."""
        fps = UNKNOWN_FPS if video_fps is None else video_fps
        seconds = [index / fps for index in (*indices, indices[-1])]
        middles = [(first + last) / 2 for first, last in zip(seconds[0:-1:2], seconds[1::2])]
        return [(f"<{middle:.1f} seconds><|vision_start|>", "<|vision_end|>") for middle in middles]


def _grid_in_time(
    width: int, height: int, num_frames: int, *, size: int, least: int, most: int
) -> tuple[int, int]:
    """Return the rows and columns of visual tokens if the limits hold for all frames. Source: Qwen3-VL's smart_resize."""
    rows, columns = round(height / size), round(width / size)
    pixels = round(num_frames / 2) * 2 * rows * columns * size**2
    if pixels > most:
        shrink = math.sqrt(num_frames * height * width / most)
        return max(1, math.floor(height / shrink / size)), max(1, math.floor(width / shrink / size))
    if pixels < least:
        enlarge = math.sqrt(least / (num_frames * height * width))
        return math.ceil(height * enlarge / size), math.ceil(width * enlarge / size)
    return rows, columns


def _areas(values: Mapping[str, Any], *, old: bool) -> dict[str, Any]:
    """Return the smallest and largest area of a file; a file without ``size`` leaves the defaults of the class."""
    areas = {}
    if "size" in values:
        size = dict(values["size"])
        areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    if old:
        areas |= {key: values[key] for key in ("min_pixels", "max_pixels") if key in values}
    if not all(type(area) is int for area in areas.values()):
        raise CheckpointError(
            f"{_FILE} size: expected areas 'shortest_edge' and 'longest_edge' in pixels, got {values['size']}"
        )
    return areas
