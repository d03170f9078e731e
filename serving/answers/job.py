"""One request on its way through a worker: the request and the events of its answer."""

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
    from trio_edge.serving.requests.protocol import ChatRequest


class NewText(msgspec.Struct, frozen=True, tag=True):
    """More text of the answer."""

    text: str


class Kept(msgspec.Struct, frozen=True, tag=True):
    """The report on the kept tokens."""

    report: dict[str, Any]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The end of an answer."""

    reason: str
    """"stop" or "length"."""
    usage: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The error that ended an answer."""

    error: RequestError


Event: TypeAlias = NewText | Kept | Finished | Failed


@final
class AnswerJob:
    """A request for a worker. The worker's thread emits events, which the event loop reads."""

    def __init__(self, chat: ChatRequest, prompt: Prompt) -> None:
        """Take the request; called on the event loop."""
        self.chat, self.prompt = chat, prompt
        self.generation: Generation | None = None
        """Set by the worker while the answer runs."""
        self.is_cancelled = False
        self.has_ended = False
        """Whether the last event was emitted."""
        self.submitted = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    def emit(self, event: Event | None) -> None:
        """Emit an event, or None at the end. Any thread may call this."""
        self.has_ended = self.has_ended or event is None or isinstance(event, (Finished, Failed))
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """End the answer at the next token, or before it begins."""
        self.is_cancelled = True
        if self.generation is not None:
            self.generation.cancel()

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events until the last one."""
        while (event := await self._events.get()) is not None:
            yield event
            if isinstance(event, (Finished, Failed)):
                return
