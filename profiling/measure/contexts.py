"""Times decode steps at contexts from a question without an image to the end of the KV caches.

Rows of the caches are skipped to reach a context. Their contents do not matter, because graphs read whole buffers.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trio_edge.profiling.measure.answers import LoadedBundle, RunQuestion

if TYPE_CHECKING:
    from collections.abc import Sequence


ROUNDS = 8
_LEAST_ROUNDS = 2
POINTS = 6
"""Contexts after the question with its image."""
_TOKENS = 4
_SETTLING = 12
"""Tokens after a prefill that are not timed: its data fills the processor's caches, which makes them slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedContext:
    """The decode step at one context length."""

    context: int
    """Rows before it, without token reduction."""
    cached_rows: float
    """Rows before it in the KV caches, mean over layers."""
    milliseconds: list[float] = field(default_factory=list)
    """One value per round: the median of a few tokens."""


def time_contexts(
    bundles: Sequence[LoadedBundle], question: RunQuestion, *, seconds: float
) -> list[list[TimedContext]]:
    """Return each bundle's times at ascending contexts of ``question``; bundles take turns.

    After ``_LEAST_ROUNDS``, no round starts after ``seconds``.
    """
    found: list[dict[int, TimedContext]] = [{} for _ in bundles]
    end = time.perf_counter() + seconds
    for number in range(ROUNDS):
        if number >= _LEAST_ROUNDS and number % 2 == 0 and time.perf_counter() > end:
            break  # only after an even number, so that as many rounds descend as ascend
        for loaded, contexts in zip(bundles, found):
            for image in (None, question.image):
                asked = RunQuestion(image=image, prompt=question.prompt, new_tokens=1)
                _time_round(loaded, asked, contexts, is_downward=number % 2 == 1)
    return [[contexts[rows] for rows in sorted(contexts)] for contexts in found]


def _time_round(
    loaded: LoadedBundle, question: RunQuestion, contexts: dict[int, TimedContext], *, is_downward: bool
) -> None:
    """Time tokens at all ``contexts`` of a question, without the first ones after the prefill.

    With ``is_downward`` the longest context comes first, so that a drift does not look like a slope.
    """
    manifest, seen = loaded.bundle.manifest, loaded.answer(question).statistics
    prompt = seen.visual_tokens + seen.text_tokens
    cached = seen.average_keep * seen.visual_tokens + seen.text_tokens
    room = manifest.text_buckets[-1] + manifest.max_new_tokens - seen.text_tokens
    num_tokens = min(_TOKENS, room)
    points = _points(room - num_tokens, count=1 if question.image is None else POINTS)
    done = min(_SETTLING, room)
    loaded.pipeline.time_tokens(done)
    for rows in reversed(points) if is_downward else points:
        times = loaded.pipeline.time_tokens(num_tokens, skip=rows - done)
        done = rows + num_tokens
        known = TimedContext(context=prompt + rows, cached_rows=cached + rows)
        contexts.setdefault(known.context, known).milliseconds.append(statistics.median(times))


def _points(last: int, *, count: int) -> list[int]:
    """Return at most ``count`` numbers of rows after a prompt, evenly spread from 0 to ``last``."""
    count = min(count, last + 1)
    return [0] if count < 2 else [index * last // (count - 1) for index in range(count)]
