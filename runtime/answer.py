"""One answer: its text as a stream, and its cost."""

from __future__ import annotations

import threading
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError, ShapeError, TrioEdgeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray
    from PIL import Image

    from trio_edge.runtime.images.processing import ImageLayout
    from trio_edge.runtime.model.answers.sampling import TokenLogprobs


@dataclass(slots=True)
class Statistics:
    """Cost of one answer. Times are wall-clock milliseconds on the host."""

    level: str = ""
    """The level that gave the answer."""
    levels_below: tuple[str, ...] = ()
    """Levels that ran before and were not sure enough (level "auto")."""
    margin: float | None = None
    """Difference between the first token's two highest probabilities, where a higher level could have followed."""
    visual_tokens: int = 0
    """Visual tokens of the images, before any selection."""
    kept_tokens: tuple[int, ...] = ()
    """Visual tokens kept by each stage."""
    average_keep: float = 1.0
    """Mean over decoder layers of the visual tokens processed, as a fraction of ``visual_tokens``."""
    text_tokens: int = 0
    """Prompt tokens without the visual ones."""
    cached_tokens: int = 0
    """Prompt tokens, visual ones included, whose rows in the KV caches come from an earlier question about the same images."""
    new_tokens: int = 0
    steps: int = 0
    """Decode steps; without drafts and certain tokens, each gives one token."""
    draft_tokens: int = 0
    """Tokens that were drafted by ``lookup``."""
    accepted_tokens: int = 0
    """Drafted tokens that were right."""
    ttft_ms: float = 0.0
    """Work up to the first token: reading the images, vision, prefill, sampling."""
    prefill_ms: float = 0.0
    """The decoder's part of ``ttft_ms``."""
    decode_ms: float = 0.0
    """All tokens after the first, in total."""
    token_ms: list[float] = field(default_factory=list)
    """Each token after the first; those of one step share its time."""
    graph_ms: dict[str, float] = field(default_factory=dict)
    """Device time of each graph up to the first token."""
    kv_bytes: int = 0
    """KV cache in use at the end."""
    repaired_stages: int = 0
    """Stages whose parallel NMS was redone exactly on the host."""
    prefix_was_kept: bool = False
    """Whether the first layer range ran only the question's rows and reused the rows before them (--follow-ups)."""
    image_was_kept: bool = False
    """Whether the visual tokens of all images were reused from an earlier question, so that no vision graph ran."""

    def add_times(self, times: Mapping[str, float]) -> None:
        """Add to ``graph_ms``."""
        for name, milliseconds in times.items():
            self.graph_ms[name] = self.graph_ms.get(name, 0.0) + milliseconds

    @property
    def tokens_per_second(self) -> float:
        """Decode speed after the first token; 0 if there was no second one."""
        return 1e3 * (self.new_tokens - 1) / self.decode_ms if self.decode_ms > 0 else 0.0


@final
class Generation:
    """One answer. Iterate to stream its pieces; ``text`` is the whole answer. Runs once, lazily."""

    def __init__(self, steps: Callable[[Generation], Iterator[str]]) -> None:
        self.statistics = Statistics()
        self.token_ids: list[int] = []
        """Token ids of the answer, including the stop token if one came."""
        self.first_logits: NDArray[np.float32] = np.empty(0, np.float32)
        """[V], logits of the first token; available with the first piece."""
        self.logprobs: list[TokenLogprobs] = []
        """Log probabilities of each token in ``token_ids``; empty if ``num_logprobs`` was not given."""
        self.kept: list[NDArray[np.int32]] = []
        """Kept tokens of each stage: ascending indices into the visual tokens of all images."""
        self.images: tuple[Image.Image, ...] = ()
        """The decoded images, upright and RGB; available with the first piece, like ``layouts``."""
        self.layouts: tuple[ImageLayout, ...] = ()
        """Layout of each image's visual tokens that entered the decoder."""
        self.is_cancelled = False
        self._pieces: list[str] = []
        self._failure: TrioEdgeError | None = None
        self._lock = threading.Lock()
        """Held while a piece is generated."""
        self._steps = steps(self)

    def __iter__(self) -> Iterator[str]:
        """Yield the answer's text piece by piece.

        Raises:
            TrioEdgeError: If the answer failed, also when it is read again, or another thread is reading it.
        """
        index = 0
        while index < len(self._pieces) or self._advance():
            yield self._pieces[index]
            index += 1

    def _advance(self) -> bool:
        """Generate one more piece; return False at the end."""
        if self._failure is not None:
            raise copy(self._failure)
        if not self._lock.acquire(blocking=False):
            raise ShapeError("answer: expected one thread that reads it, got a second one; use one thread")
        try:
            piece = next(self._steps, None)
        except BaseException as error:
            # A copy, because the error itself holds this object in a cycle, and the pipeline.
            text = f"answer: expected a whole one, it ended with {type(error).__name__}: {error}; ask again"
            self._failure = copy(error) if isinstance(error, TrioEdgeError) else BackendError(text)
            raise
        finally:
            self._lock.release()
        if piece is not None:
            self._pieces.append(piece)
        return piece is not None

    def cancel(self) -> None:
        """End the answer at the next token. Any thread may call this."""
        self.is_cancelled = True

    @property
    def boxes(self) -> NDArray[np.float32]:
        """[N, 4], box in image pixels of each visual token that entered the decoder; NaN for newline tokens."""
        return np.concatenate([np.empty((0, 4), np.float32), *(layout.boxes for layout in self.layouts)])

    @property
    def text(self) -> str:
        """The whole answer; generates the part that has not been streamed yet, with the errors of iterating."""
        for _ in self:
            pass
        return "".join(self._pieces)
