"""A request in a worker, and the events of its answer."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias, final

import msgspec

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio_edge.runtime.answer import Generation
    from trio_edge.serving.requests.content import Prompt
    from trio_edge.serving.requests.decisions import Asking
    from trio_edge.serving.requests.protocol import ChatRequest


class NewText(msgspec.Struct, frozen=True, tag=True):
    """More text of the answer."""

    text: str
    logprobs: list[dict[str, Any]] = []
    """OpenAI's entry for each new token, if the request asks for them."""


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The report of ``kept_report``."""

    report: dict[str, Any]


class Decided(msgspec.Struct, frozen=True, tag=True):
    """The answer to one of several questions with a fixed set of answers."""

    index: int
    """The question's place in the request."""
    probabilities: list[float]
    """One for each of the question's options."""
    score: float
    """Mean of the levels' numbers."""
    diagnostics: dict[str, Any]
    """Our own fields: how sure the model was of any option, and the visual tokens."""


class NextAnswer(msgspec.Struct, frozen=True, tag=True):
    """The end of an answer that another one to the same request follows."""

    reason: str


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of the last answer."""

    reason: str
    """"stop" or "length"."""
    usage: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The end of a failed answer."""

    error: RequestError


Event: TypeAlias = NewText | Kept | Decided | NextAnswer | Finished | Failed


@final
class AnswerJob:
    """A request in a worker. The worker's thread emits events, and the event loop reads them."""

    def __init__(self, chat: ChatRequest, prompt: Prompt, asking: Asking | None = None) -> None:
        """Store the request; ``asking`` has the questions that it asks in place of a chat. Called on the event loop."""
        self.chat, self.prompt, self.asking = chat, prompt, asking
        self.generation: Generation | None = None
        """The running answer, set by the worker."""
        self.is_cancelled = False
        self.has_ended = False
        """Whether the last event was emitted."""
        self.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(self, event: Event | None) -> None:
        """Emit an event, or None for the end. It is thread-safe."""
        self.has_ended = self.has_ended or event is None or isinstance(event, (Finished, Failed))
        with suppress(RuntimeError):  # the event loop has closed, so nobody reads
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """End the answer at its next token, or before it begins."""
        self.is_cancelled = True
        if self.generation is not None:
            self.generation.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events to the last one."""
        while (event := await self._events.get()) is not None:
            yield event
            if isinstance(event, (Finished, Failed)):
                return
