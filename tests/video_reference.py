"""Runs Hugging Face's video processors of Qwen2.5-VL and Qwen3-VL; a part of ``tests.torchvision_reference``.

To compare another video, add a case to ``VIDEO_CASES``; ``theirs(name)`` returns what the processor gave for it.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from tests.pictures import random_picture

MARKS = ("<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PROMPT = "<|im_start|>user <|vision_start|><|video_pad|><|vision_end|> what is it?"
SMALL = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 20 * 28 * 28}, "patch_size": 14}
FEW_FRAMES = {"min_frames": 3, "max_frames": 11}
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL": {"video_processor_type": "Qwen2VLVideoProcessor"},
    "Qwen2.5-VL small": {"video_processor_type": "Qwen2VLVideoProcessor", **SMALL, **FEW_FRAMES},
    "Qwen2.5-VL capped": {
        "video_processor_type": "Qwen2VLVideoProcessor", **SMALL, "cap_pixels_per_frame": True, "max_video_tokens": 60
    },
    "Qwen2.5-VL old sizes": {
        "video_processor_type": "Qwen2VLVideoProcessor", "min_pixels": 3 * 28 * 28, "max_pixels": 9 * 28 * 28
    },
    "Qwen3-VL": {"video_processor_type": "Qwen3VLVideoProcessor"},
    "Qwen3-VL small": {
        "video_processor_type": "Qwen3VLVideoProcessor", **FEW_FRAMES, "patch_size": 14,
        "size": {"shortest_edge": 30 * 28 * 28, "longest_edge": 90 * 28 * 28},
    },
    "Qwen3-VL capped": {
        "video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 14, "cap_pixels_per_frame": True,
        "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 90 * 28 * 28}, "max_video_tokens": 12,
    },
    "Qwen3-VL unsampled": {
        "video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 14, "do_sample_frames": False, "resample": 2,
        "size": {"shortest_edge": 30 * 28 * 28, "longest_edge": 90 * 28 * 28}, "do_normalize": False,
    },
}  # fmt: skip
"""Contents of video_preprocessor_config.json."""


@dataclass(frozen=True, kw_only=True)
class VideoCase:
    """One video, and how it is sampled."""

    config: str
    """Name in ``CONFIGS``."""
    total: int
    size: tuple[int, int]
    """Width and height."""
    fps: float | None = None
    """Of the video."""
    request: dict[str, float] = field(default_factory=dict)
    """fps or num_frames."""

    def frames(self) -> list[Any]:
        """Return the video's frames, PIL images that are all different."""
        return [random_picture(*self.size, seed=index) for index in range(self.total)]


def _cases() -> dict[str, VideoCase]:
    asked: list[dict[str, float]] = [{}, {"fps": 2.0}, {"fps": 7.3}, {"num_frames": 6}]
    found = {}
    for config, total, request in itertools.product(CONFIGS, (1, 2, 3, 5, 37), asked):
        if "small" not in config and total not in (3, 5):
            continue
        if (request or "Qwen3" in config) and (total == 1 or request.get("num_frames", 0) > total):
            continue  # Hugging Face's classes fail; ours have tests of their own
        size = {1: (50, 30), 2: (301, 57), 3: (31, 290), 5: (113, 97), 37: (120, 86)}[total]
        fps = 29.97 if request.get("fps") == 7.3 else 12.0
        case = VideoCase(config=config, total=total, size=size, fps=fps, request=request)
        found[f"{config}, {total} frames, {request or 'all'}"] = case
    for config in ("Qwen2.5-VL small", "Qwen3-VL small"):
        found[f"{config}, rate not known"] = VideoCase(config=config, total=9, size=(60, 90))
    return found


VIDEO_CASES = _cases()
TOTALS = (*range(2, 60), 99, 100, 240, 241, 899, 1801)
RATES = (23.976023976023978, 10.0, 29.97)
REQUESTS: tuple[dict[str, float], ...] = (
    {"fps": 2.0}, {"fps": 0.3}, {"fps": 24.0}, {"fps": 1.7}, {"num_frames": 2}, {"num_frames": 7}, {"num_frames": 32}
)  # fmt: skip


def sampling_cases() -> list[tuple[int, float, dict[str, float]]]:
    """Return frames in all, frames per second and request of the cases that are only sampled."""
    return list(itertools.product(TOTALS, RATES, REQUESTS))


def video_arrays() -> dict[str, Any]:
    """Return what Hugging Face's classes give for all cases, by name."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen3VLProcessor

    arrays: dict[str, Any] = {}
    tokenizer = _tokenizer()
    for config, values in CONFIGS.items():
        is_old = "Qwen2.5" in config
        kind = Qwen2_5_VLProcessor if is_old else Qwen3VLProcessor
        loaded = video_processor(values)
        processor = kind(Qwen2VLImageProcessor(), tokenizer, loaded)
        arrays[f"videos/{config}/constants"] = json.dumps(loaded.to_dict())
        arrays[f"videos/{config}/sampling"] = json.dumps(
            [_indices(loaded, *case) for case in sampling_cases()]
        )
        for name, case in VIDEO_CASES.items():
            if case.config == config:
                arrays |= {f"videos/{name}/{key}": value for key, value in _outputs(processor, case).items()}
    return arrays


def video_processor(values: dict[str, Any]) -> Any:
    """Return Hugging Face's class with the values of a video_preprocessor_config.json."""
    import transformers as hf

    values = dict(values)
    return getattr(hf, values.pop("video_processor_type"))(**values)


def _outputs(processor: Any, case: VideoCase) -> dict[str, Any]:
    video = np.stack([np.asarray(frame) for frame in case.frames()])
    metadata = {"total_num_frames": case.total, "fps": case.fps, "frames_indices": np.arange(case.total)}
    asked: dict[str, Any] = dict(case.request)
    if asked:
        asked["do_sample_frames"] = True
    own = processor.video_processor.fps
    if "num_frames" in asked:  # an error where the class has frames per second of its own
        processor.video_processor.fps = None
    outputs, (text,) = processor._process_videos(
        [video], video_metadata=[metadata], return_metadata=True, return_tensors="pt", **asked
    )
    processor.video_processor.fps = own
    (found,) = outputs.pop("video_metadata")
    (prompt,), _ = processor.get_text_with_replacements([PROMPT], videos_replacements=[text])
    arrays = {key: np.asarray(value) for key, value in outputs.items()}
    return {**arrays, "indices": np.asarray(found.frames_indices), "prompt": prompt}


def _indices(processor: Any, total: int, fps: float, request: dict[str, float]) -> list[int] | None:
    """Return the sampled frames; None if the class fails."""
    from transformers.video_utils import VideoMetadata

    try:
        return processor.sample_frames(VideoMetadata(total_num_frames=total, fps=fps), **request).tolist()  # type: ignore[no-any-return]
    except (ValueError, ZeroDivisionError):
        return None


def _tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(("<unk>", *MARKS))}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
