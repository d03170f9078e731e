"""The inputs of an export: the user's options, and callbacks for a progress display."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from trio_edge.export.quantize.plan import QuantizePlan
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.graph_io import MAX_TEXT, STEP_ROWS
from trio_edge.runtime.bundle.limits import MOST_TOKENS
from trio_edge.runtime.bundle.manifest import AUTO
from trio_edge.trio.budgets import ScheduleRequest
from trio_edge.trio.cost.devices import find_device
from trio_edge.trio.methods import TokenMethod, all_methods, token_method

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trio_edge.runtime.bundle.schedule import Schedule

MOST_IMAGES = 1024
"""Upper limit of --max-images, far above any model's positions."""


@dataclass(frozen=True, slots=True)
class LevelRequest:
    """A budget of a bundle with several."""

    name: str
    schedule: ScheduleRequest | Schedule
    image_form: str | None = None
    """"base" for the tile that shows the whole image, "WIDTHxHEIGHT" for images of at most as many pixels, "low" for one of
    both; None for the whole image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """The user's choices. The fields hold the only defaults."""

    model: str
    """Alias, Hub id or checkpoint folder."""
    out: Path
    revision: str | None = None
    dtype: Literal["auto", "float16", "float32"] = "auto"
    """Element type of weights and activations; "auto" is float32 for a float32 checkpoint, else float16."""
    image_sizes: tuple[tuple[int, int], ...] = ()
    """(width, height) of images that get exact shapes, without padding; the schedule fits the largest."""
    min_visual: int | None = None
    """Least visual tokens of an image, in Qwen-VL; smaller images are enlarged."""
    pad_images: bool = False
    """Pad images to squares with the mean colour before they are resized, as LLaVA-1.5's own evaluation does; its Hugging Face
    processor crops them instead."""
    only_image_sizes: bool = False
    """Make no shapes for other image sizes; the runtime then refuses images that need more visual tokens."""
    max_visual: int | None = None
    """Most visual tokens of an image of any size, in families that scale images (Qwen-VL, Ministral 3) or cut fewer tiles
    (InternVL, LLaVA-OneVision and SmolVLM2)."""
    max_images: int = 1
    """Images of a prompt if all have the largest exported size; smaller images may be more."""
    max_frames: int | None = None
    """Frames of a video, in families that take videos; two frames take the room of one image."""
    follow_ups: bool = False
    """Let the first layer range run a question after the kept rows of an earlier question about the same images."""
    decode_rows: int = STEP_ROWS[-1]
    """Most rows of a decode step: a new token, and drafts of the tokens after it."""
    outputs: Literal["tokens", "hidden"] = "tokens"
    """"hidden" also gives a prefill's last hidden states to the host, for other heads than the language model's."""
    batch: int = 1
    """Answers that decode together, each with its own KV cache."""
    max_text: int = MAX_TEXT
    """Largest prompt in text tokens."""
    text_buckets: tuple[int, ...] = ()
    """Text lengths that prompts are padded to, besides ``max_text``; if empty, powers of two from 32."""
    max_new_tokens: int = 256
    """Longest answer, in tokens; the KV caches have room for it."""
    encoder_keep: int | float | None = None
    """Patches per tile, or visual tokens per image, that the vision encoder keeps (encoder reduction); below 1 a share
    of them; None keeps all."""
    schedule: ScheduleRequest | Schedule = ScheduleRequest()  # noqa: RUF009  # frozen
    """The reduction inside the decoder."""
    levels: tuple[LevelRequest, ...] = ()
    """Several budgets instead of ``schedule``; the first is the default."""
    token_method: str | None = None
    """Selector before the decoder, by its name in ``trio_edge.trio.methods``; works with any schedule."""
    token_keep: int | float | None = None
    """Visual tokens of an image that it keeps; below 1 a share of them."""
    clip: str | None = None
    """CLIP model (folder or Hub id) in whose space ``token_method`` compares question and image; None for the decoder's
    embedding space."""
    quantize: QuantizePlan = field(default_factory=QuantizePlan)
    opset: int = 18
    """ONNX opset, 18 or 19, the last one that TensorRT 10.3 reads; graphs with INT4 weights have 21."""
    force: bool = False
    target: str | None = None
    """Device whose memory is checked; the bundle does not depend on it."""

    def __post_init__(self) -> None:
        if self.target is not None:
            find_device(self.target)
        for name, value, low, high in (
            ("max-images", self.max_images, 1, MOST_IMAGES),
            ("max-frames", self.max_frames, 2, 2 * MOST_IMAGES),
            ("max-text", self.max_text, 8, MOST_TOKENS),
            ("max-new-tokens", self.max_new_tokens, 1, MOST_TOKENS),
        ):
            if value is not None and not low <= value <= high:
                raise ScheduleError(
                    f"--{name}: expected {low}..{high}, got {value}; choose a number in this range"
                )
        if (message := self._wrong_choice()) is not None:
            raise ScheduleError(message)

    @property
    def num_units(self) -> int:
        """Most runs of the vision graph per prompt: images, or pairs of a video's frames."""
        return max(self.max_images, -(-(self.max_frames or 0) // 2))

    def _wrong_choice(self) -> str | None:
        """Return the message about the first option that is wrong, or does not fit the others; None if all are right."""
        for name, count in (("decode-rows", self.decode_rows), ("batch", self.batch)):
            if count not in STEP_ROWS:
                known = ", ".join(map(str, STEP_ROWS))
                return f"--{name}: expected one of {known}, got {count}; choose one of these"
        if self.opset not in (18, 19):
            return f"--opset: expected 18 or 19, got {self.opset}; choose one of these"
        if any(not 8 <= bucket <= self.max_text for bucket in self.text_buckets):
            text = f"expected sizes in 8..{self.max_text} (--max-text), got {list(self.text_buckets)}"
            return f"--text-buckets: {text}; remove the others"
        if self.only_image_sizes and not self.image_sizes:
            return "--only-image-sizes: expected --image-size with it, got none; add your camera's size"
        for width, height in self.image_sizes:
            if not (1 <= width <= 65535 and 1 <= height <= 65535):
                text = f"expected sides of 1..65535 pixels, got {width}x{height}"
                return f"--image-size: {text}; give the camera's size"
        if (self.token_method is None) != (self.token_keep is None):
            missing = "--token-method" if self.token_method is None else "--token-keep"
            return f"--token-method and --token-keep: expected both or none, got one; add {missing}"
        if (message := self._wrong_level()) is not None:
            return message
        row = None if self.token_method is None else token_method(self.token_method)
        if self.clip is not None and (row is None or not row.takes_clip):
            able = " or ".join(other.name for other in all_methods(TokenMethod) if other.takes_clip)
            return f"--clip: expected --token-method {able} with it, got {self.token_method or 'none'}; leave out --clip"
        return None

    def _wrong_level(self) -> str | None:
        names = [level.name for level in self.levels]
        for name in names:
            if name == AUTO or re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,31}", name) is None:
                text = f"expected a name of small letters, digits, - and _, and not {AUTO!r}, got {name!r}"
                return f"--level: {text}; choose another"
        if len(set(names)) < len(names):
            return f"--level: expected different names, got {', '.join(names)}; rename one"
        if self.token_method is not None and any(level.image_form for level in self.levels):
            return "--level: expected no image form with --token-method, got one; leave out one of them"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Callbacks for a progress display."""

    step: Callable[[str], None] = lambda _text: None
    """Called with the name of the next step."""
    expect_bytes: Callable[[int], None] = lambda _count: None
    """Called once with the number of bytes of all weights."""
    wrote_bytes: Callable[[int], None] = lambda _count: None
    """Called with the number of bytes written since the last call."""
    warn: Callable[[str], None] = lambda _text: None
    """Called with a warning of one line."""
