"""Answers the same questions about frame after frame, and says when an answer changes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, final

import numpy as np
from PIL import Image

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.limits import is_number, is_whole
from trio_edge.runtime.decisions.questions import check_questions
from trio_edge.runtime.images.overlay import draw_all
from trio_edge.runtime.images.reading import open_image
from trio_edge.runtime.model.levels import chain_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.decisions.questions import Decision, Question
    from trio_edge.runtime.images.reading import ImageSource
    from trio_edge.runtime.pipeline import Pipeline

THRESHOLD = 2.0
"""Difference of two frames, the root mean square over gray levels 0 to 255, from which the model runs again. Noise, JPEG and a
clock in the corner stay below 1.3; an object of half a percent of the frame is above 4 (docs/camera.md)."""
_SIDE = 32
"""Frames are compared as [32, 32]: a mean over many pixels has little of a camera's noise."""


@final
@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A decision about a frame."""

    frame: int
    """Number of the frame."""
    time: float
    """Seconds since 1970."""
    decision: Decision
    previous: str | None
    """The answer before it; None for the first one."""
    image: Image.Image
    """The image that the model saw: the frame, or an earlier one that looked like it."""

    def to_json(self, *, source: str) -> str:
        """Return the line of ASCII that trio-watch prints; ``source`` is the frame's."""
        when = datetime.fromtimestamp(self.time, timezone.utc).isoformat(timespec="milliseconds")
        line = {"time": when, "source": source, "frame": self.frame, "previous": self.previous}
        return json.dumps(line | self.decision.to_dict())


@final
class Watcher:
    """Takes frames and returns what is worth telling. A frame that looks like the last one costs no model run."""

    def __init__(
        self,
        pipeline: Pipeline,
        questions: Sequence[Question],
        *,
        only_changes: bool = False,
        hold: int = 1,
        margin: float = 0.0,
        threshold: float = THRESHOLD,
        level: str | None = None,
    ) -> None:
        """Check the questions; runs nothing.

        Args:
            pipeline: An open pipeline.
            questions: What to ask about each frame.
            only_changes: Return a decision only if its answer is another than before.
            hold: Frames in a row that must have an answer before it counts as a change.
            margin: Smallest difference of the two highest probabilities with which an answer counts; with a smaller one, the
                answer before stays.
            level: As for ``Pipeline.decide``.
            threshold: Difference from the last frame that the model saw, 0 to 255, from which it runs again; 0 means always.

        Raises:
            ShapeError: If an argument is out of range.
        """
        self._pipeline, self._questions = pipeline, check_questions(questions)
        if not is_whole(hold) or hold < 1:
            raise ShapeError(f"hold: expected a number of frames from 1, got {hold!r:.80}; choose another")
        for name, value, most in (("margin", margin, 1), ("threshold", threshold, 255)):
            if not is_number(value) or not 0 <= value <= most:
                raise ShapeError(f"{name}: expected 0..{most}, got {value!r:.80}; choose another number")
        if level is not None:
            chain_of(pipeline.manifest, level, {})  # refuses an unknown one
        self._only_changes, self._threshold, self._level = only_changes, threshold, level
        self._answers = [_HeldAnswer(hold, margin) for _ in self._questions]
        self._decisions: list[Decision] = []
        self._image = Image.new("RGB", (1, 1))
        self._small: NDArray[np.float32] | None = None
        self._num_frames = 0

    def see(
        self, image: ImageSource, *, frame: int | None = None, at: float | None = None
    ) -> list[WatchEvent]:
        """Return the decisions about a frame, or those whose answer changed.

        Args:
            image: The frame; ``open_image`` says what it may be.
            frame: Its number; by default the number of frames seen before.
            at: Seconds since 1970; by default now.

        Raises:
            ImageError: If the frame cannot be read.
            ShapeError: If a question or the frame does not fit the bundle.
            BackendError: If the pipeline is closed, or a graph fails.
        """
        number = self._num_frames if frame is None else frame
        when = time.time() if at is None else at
        rgb = open_image(image)
        self._num_frames += 1
        small = small_gray(rgb)
        # Compared with the last frame that the model saw, so that a slow change is not missed.
        has_run = self._small is None or difference(small, self._small) >= self._threshold
        if has_run:
            self._decisions = self._pipeline.decide(rgb, self._questions, level=self._level)
            self._image, self._small = rgb, small
        events = []
        for decision, answer in zip(self._decisions, self._answers):
            previous, has_changed = answer.current, answer.take(decision)
            if has_changed if self._only_changes else has_run:
                events.append(WatchEvent(number, when, decision, previous, self._image))
        return events

    def drawing(self, event: WatchEvent) -> Image.Image:
        """Return the event's frame with the visual tokens that each stage kept."""
        schedule = self._pipeline.manifest.at_level(event.decision.statistics.level).schedule
        captions = [f"layer {layer}" for layer in schedule.layers]
        return draw_all([event.image], event.decision.layouts, event.decision.kept, captions=captions)


def small_gray(image: Image.Image) -> NDArray[np.float32]:
    """Return an RGB image as gray levels [32, 32], by which frames are compared."""
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BOX).convert("L"), np.float32)


def difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Return the root mean square difference of two small frames: unlike the mean, it is large for a small object too."""
    return float(np.sqrt(np.mean(np.square(one - other))))


@dataclass(slots=True)
class _HeldAnswer:
    """The answer to one question, which changes only when a new one is clear and lasts."""

    hold: int
    margin: float
    current: str | None = None
    _seen: str | None = None
    _count: int = 0

    def take(self, decision: Decision) -> bool:
        """Return whether ``decision`` changes the answer."""
        *_, second, first = sorted(decision.probabilities)
        seen = decision.choice if first - second >= self.margin else self.current
        self._count = self._count + 1 if seen == self._seen else 1
        self._seen = seen
        if seen == self.current or self._count < self.hold:
            return False
        self.current = seen
        return True
