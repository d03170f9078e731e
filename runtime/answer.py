"""One answer: what the caller streams, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.images.layout import ImageLayout


@dataclass(slots=True)
class Statistics:
    """Cost of one answer. Times are wall-clock milliseconds on the host."""

    visual_tokens: int = 0
    """Visual tokens of the images, before any selection."""
    kept_tokens: tuple[int, ...] = ()
    """Visual tokens kept by each stage."""
    average_keep: float = 1.0
    """Mean over decoder layers of the visual tokens processed, as a fraction of ``visual_tokens``."""
    text_tokens: int = 0
    """Prompt tokens without the visual ones."""
    new_tokens: int = 0
    ttft_ms: float = 0.0
    """Work up to the first token: reading the images, vision, prefill, sampling."""
    prefill_ms: float = 0.0
    """Decoder part of the first token."""
    decode_ms: float = 0.0
    """All tokens after the first."""
    token_ms: list[float] = field(default_factory=list)
    """Each of them."""
    graph_ms: dict[str, float] = field(default_factory=dict)
    """Time that the device spent in each graph up to the first token."""
    kv_bytes: int = 0
    """KV rows in use at the end."""
    repaired_stages: int = 0
    """Stages whose parallel NMS was redone exactly on the host."""
    prefix_was_kept: bool = False
    """Whether the first layer range ran only the question's rows, as those before them were kept (--follow-ups)."""
    image_was_kept: bool = False
    """Whether no vision graph ran, as the visual tokens of all images were kept from an earlier question."""

    @property
    def tokens_per_second(self) -> float:
        """Decode speed after the first token; 0 if there was no second one."""
        return (
            1e3 * (self.new_tokens - 1) / self.decode_ms
            if self.new_tokens > 1 and self.decode_ms > 0
            else 0.0
        )


@final
class Generation:
    """One answer: iterate to stream its pieces; ``text`` is all of it. Runs once, lazily."""

    def __init__(self, steps: Callable[[Generation], Iterator[str]]) -> None:
        self.statistics = Statistics()
        self.token_ids: list[int] = []
        """Ids of the answer, the stop token included if one came."""
        self.first_logits: NDArray[np.float32] = np.empty(0, np.float32)
        """[V], of the answer's first token; filled when the first piece is asked for."""
        self.kept: list[NDArray[np.int32]] = []
        """Per stage the kept tokens as indices into the visual tokens of all images, ascending."""
        self.images: tuple[Image.Image, ...] = ()
        """The images as they were read, upright, RGB; filled with the first piece, like ``layouts``."""
        self.layouts: tuple[ImageLayout, ...] = ()
        """For each image, the layout of its visual tokens that entered the decoder."""
        self.is_cancelled = False
        self._pieces: list[str] = []
        self._steps = steps(self)

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's text piece by piece."""
        yield from tuple(self._pieces)
        for piece in self._steps:
            self._pieces.append(piece)
            yield piece

    def cancel(self) -> None:
        """End the answer at the next token; any thread may call it."""
        self.is_cancelled = True

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4], box on its image in pixels of each visual token that entered the decoder; NaN for newline tokens."""
        return np.concatenate([np.empty((0, 4), np.float32), *(layout.boxes for layout in self.layouts)])

    @property
    def text(self) -> str:
        """The whole answer; runs what has not been streamed yet."""
        for _ in self:
            pass
        return "".join(self._pieces)
