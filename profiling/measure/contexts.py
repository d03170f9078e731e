"""Times tokens at contexts of all lengths, from a question without a picture to the end of the KV caches.

A context is reached by leaving rows of the caches out: the graphs read whole buffers, so what a row holds takes no time.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trio_edge.profiling.measure.answers import Question

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.profiling.measure.answers import Subject

ROUNDS = 8
_LEAST_ROUNDS = 2
POINTS = 6
"""Behind the question with its picture."""
_TOKENS = 4
"""Of a point in each round."""
_SETTLING = 12
"""Tokens behind a prefill that are left out: the prefill's data has taken the place of theirs in the processor's caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedContext:
    """A token at one length of context."""

    context: int
    """Rows before it, visual tokens not reduced."""
    cached_rows: float
    """Rows before it in the KV caches, mean over layers."""
    milliseconds: list[float] = field(default_factory=list)
    """One for each round: the median of a few tokens."""


def time_contexts(
    subjects: Sequence[Subject], question: Question, *, seconds: float
) -> list[list[TimedContext]]:
    """Return each subject's times at ascending contexts, all subjects in turns.

    Args:
        subjects: Loaded bundles.
        question: Whose picture and prompt stand before the tokens.
        seconds: After which no more rounds begin, but for the first ``_LEAST_ROUNDS``.

    Raises:
        TrioEdgeError: As ``Pipeline.generate``.
    """
    found: list[dict[int, TimedContext]] = [{} for _ in subjects]
    end = time.perf_counter() + seconds
    for number in range(ROUNDS):
        if number >= _LEAST_ROUNDS and number % 2 == 0 and time.perf_counter() > end:
            break  # with as many rounds downwards as upwards
        for subject, contexts in zip(subjects, found):
            for picture in (None, question.picture):
                asked = Question(picture=picture, prompt=question.prompt, new_tokens=1)
                _time_round(subject, asked, contexts, is_downward=number % 2 == 1)
    return [[contexts[rows] for rows in sorted(contexts)] for contexts in found]


def _time_round(
    subject: Subject, question: Question, contexts: dict[int, TimedContext], *, is_downward: bool
) -> None:
    """Time one token after the other at all contexts of a question; those right behind a prefill are slower, and left out.

    Args:
        subject: Answers the question first.
        question: What stands before the tokens.
        contexts: By their rows; gets the times.
        is_downward: Whether the longest context comes first, so that no drift looks like a slope.
    """
    manifest, seen = subject.bundle.manifest, subject.answer(question).statistics
    prompt = seen.visual_tokens + seen.text_tokens
    cached = seen.average_keep * seen.visual_tokens + seen.text_tokens
    room = manifest.text_buckets[-1] + manifest.max_new_tokens - seen.text_tokens
    num_tokens = min(_TOKENS, room)
    points = _points(room - num_tokens, count=1 if question.picture is None else POINTS)
    done = min(_SETTLING, room)
    subject.pipeline.time_tokens(done)
    for rows in reversed(points) if is_downward else points:
        times = subject.pipeline.time_tokens(num_tokens, skip=rows - done)
        done = rows + num_tokens
        known = TimedContext(context=prompt + rows, cached_rows=cached + rows)
        contexts.setdefault(known.context, known).milliseconds.append(statistics.median(times))


def _points(last: int, *, count: int) -> list[int]:
    """Return rows behind a prompt, evenly from 0 to ``last``, as many as there is room for."""
    count = min(count, last + 1)
    return [0] if count < 2 else [index * last // (count - 1) for index in range(count)]
