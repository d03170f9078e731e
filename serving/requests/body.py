"""Reads a request's body, with limits on its bytes, its time, and the bytes of all requests together."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, final

from starlette.requests import ClientDisconnect

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from types import TracebackType

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from trio_edge.serving.settings import ServerSettings

_LINGER_S = 2.0  # for the rest of a refused body


@final
class BodyDrain:
    """Middleware that reads the rest of a refused body, for a limited time, before the refusal is sent.

    If the connection closed while the client is still sending, it would be reset and the client would not see the refusal.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        # A client that expects "100 Continue" sends nothing yet, and reading would ask it to send.
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
    """Counts the bytes of all bodies in memory, because many slow uploads must not fill the machine."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0

    def take(self, count: int) -> None:
        """Add bytes; raises RequestError if all bodies together are too large."""
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


@final
class Body:
    """The body of one request, whose bytes are counted until the block ends."""

    def __init__(self, request: Request, *, settings: ServerSettings, memory: BodyMemory) -> None:
        self._request, self._settings, self._memory = request, settings, memory
        self._taken = 0

    async def __aenter__(self) -> bytes:
        """Return the whole body.

        Raises:
            RequestError: If its content type is not JSON, it is too large, or it takes too long.
        """
        self._check_headers()
        try:
            # Not asyncio.timeout, which Python 3.10 lacks.
            return await asyncio.wait_for(self._read(), self._settings.body_s)
        except asyncio.TimeoutError:
            self._release()
            raise RequestError(
                408, f"body: expected it within {self._settings.body_s:g} s, got a part; send it faster"
            ) from None
        except ClientDisconnect:
            self._release()
            raise RequestError(499, "body: expected all of it, got a closed connection") from None
        except BaseException:
            self._release()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        self._memory.give_back(self._taken)
        self._taken = 0

    def _check_headers(self) -> None:
        kind = self._request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Other sites' web pages cannot send this type without a preflight request, which is refused.
            raise RequestError(415, f"content-type: expected application/json, got {kind[:60]!r}")
        length = self._request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > self._settings.max_body:
            raise self._too_large()

    def _too_large(self) -> RequestError:
        return RequestError(
            413,
            f"body: expected at most {self._settings.max_body} bytes, got more; send smaller images",
            code="body_too_large",
        )

    async def _read(self) -> bytes:
        chunks: list[bytes] = []
        async for chunk in self._request.stream():
            self._memory.take(len(chunk))
            self._taken += len(chunk)
            if self._taken > self._settings.max_body:
                raise self._too_large()
            chunks.append(chunk)
        return b"".join(chunks)
