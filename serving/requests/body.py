"""Request bodies, bounded in bytes, in time, and in memory over all requests."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, final

from starlette.requests import ClientDisconnect, Request

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from trio_edge.serving.settings import ServerSettings

_LINGER_S = 2.0  # for the rest of a refused body


@final
class BodyDrain:
    """Middleware that reads the rest of a refused body, for a limited time, before it sends the refusal.

    A connection that closes while the client still sends is reset, and the client never sees the refusal.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        # A client that waits for "100 Continue" sends nothing before it. Reading would ask for the body.
        is_left = scope["type"] == "http" and (b"expect", b"100-continue") not in scope["headers"]

        async def receiving() -> Message:
            nonlocal is_left
            message = await receive()
            is_left = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def drain() -> None:
            while is_left:
                await receiving()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start" and is_left:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(drain(), _LINGER_S)
            await send(message)

        await self._app(scope, receiving, sending)


@final
class BodyMemory:
    """Counts the bytes of all bodies in memory, so that many slow uploads cannot fill the machine."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0

    def take(self, count: int) -> None:
        """Add bytes.

        Raises:
            RequestError: If the sum exceeds the limit.
        """
        if self._used + count > self._limit:
            raise RequestError(
                429,
                f"body: expected at most {self._limit} bytes in all requests together, got more; try again later",
                code="server_busy",
                retry_after_s=5.0,
            )
        self._used += count

    def give_back(self, count: int) -> None:
        """Subtract bytes."""
        self._used -= count


@contextlib.asynccontextmanager
async def read_body(
    request: Request, *, settings: ServerSettings, memory: BodyMemory
) -> AsyncIterator[bytearray]:
    """Yield the body of a request. Its bytes count in ``memory`` until the block ends.

    Raises:
        RequestError: If its type is not JSON, or it is too large or too slow.
    """
    _check_headers(request, settings.max_body)
    body = bytearray()
    try:
        try:
            # wait_for and not asyncio.timeout, which Python 3.10 lacks
            await asyncio.wait_for(_receive(request, body, settings.max_body, memory), settings.body_s)
        except asyncio.TimeoutError:
            raise RequestError(
                408, f"body: expected it within {settings.body_s:g} s, got a part; send it faster"
            ) from None
        except ClientDisconnect:
            raise RequestError(499, "body: expected all of it, got a closed connection") from None
        yield body
    finally:
        memory.give_back(len(body))


def _check_headers(request: Request, max_body: int) -> None:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        # A browser sends JSON of another site's page only after it has asked this server.
        raise RequestError(415, f"content-type: expected application/json, got {kind[:60]!r}; set the header")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > max_body:
        raise _too_large(max_body)


async def _receive(request: Request, body: bytearray, max_body: int, memory: BodyMemory) -> None:
    async for chunk in request.stream():
        memory.take(len(chunk))
        body += chunk
        if len(body) > max_body:
            raise _too_large(max_body)


def _too_large(max_body: int) -> RequestError:
    message = f"body: expected at most {max_body} bytes, got more; send smaller images"
    return RequestError(413, message, code="body_too_large")
