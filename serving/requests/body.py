"""Request bodies, bounded in bytes, in time, and in memory over all requests."""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from typing import TYPE_CHECKING, final

from starlette.requests import ClientDisconnect, Request

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from trio_edge.serving.settings import ServerSettings

_LINGER_S = 2.0  # for the rest of a refused body
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_MAX_FORM_PARTS = 256
_MAX_PART_HEAD = 1000
_PART_NAME = re.compile(rb'content-disposition:[^\r\n]*[; ]name="([^"\r\n]+)"', re.IGNORECASE)


@final
class OrderlyEnd:
    """Middleware that gives each response its ``x-request-id``, and closes a connection whose body has not ended.

    It reads the rest of a refused body for a limited time before it sends the refusal: a connection that closes while the
    client still sends is reset, and the client never sees the refusal.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        # With both lengths a proxy may see another end of the body than this server (RFC 9112, 6.1).
        must_close = {b"content-length", b"transfer-encoding"} <= headers.keys()
        # A client that waits for "100 Continue" sends nothing before it. Reading would ask for the body.
        is_left, is_waiting = True, headers.get(b"expect", b"").lower() == b"100-continue"
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def receiving() -> Message:
            nonlocal is_left, is_waiting
            is_waiting, message = False, await receive()
            is_left = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def drain() -> None:
            while is_left:
                await receiving()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not is_waiting:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(drain(), _LINGER_S)
                ending = [(b"connection", b"close")] if is_left or must_close else []
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id), *ending]
            await send(message)

        await self._app(scope, receiving, sending)


@final
class BodyReader:
    """Reads bodies, and counts the bytes of all in memory, so that many slow uploads cannot fill the machine."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings, self._used = settings, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, *, takes_forms: bool = False) -> AsyncIterator[bytearray]:
        """Yield the body of a request. Its bytes count until the block ends.

        Raises:
            RequestError: If its type is not JSON or an allowed form, it is too large or slow, or there are too many others.
        """
        self._check_headers(request, takes_forms=takes_forms)
        body, seconds = bytearray(), self._settings.body_s
        try:
            try:
                # wait_for and not asyncio.timeout, which Python 3.10 lacks
                await asyncio.wait_for(self._receive(request, body), seconds)
            except asyncio.TimeoutError:
                message = f"body: expected it within {seconds:g} s, got a part; send it faster"
                raise RequestError(408, message) from None
            except ClientDisconnect:
                raise RequestError(499, "body: expected all of it, got a closed connection") from None
            yield body
        finally:
            self._used -= len(body)

    def take(self, count: int) -> None:
        """Count bytes.

        Raises:
            RequestError: If all requests together have too many.
        """
        limit = self._settings.max_body * self._settings.max_bodies
        if self._used + count > limit:
            message = (
                f"body: expected at most {limit} bytes in all requests together, got more; try again later"
            )
            raise RequestError(429, message, code="server_busy", retry_after_s=5.0)
        self._used += count

    def _check_headers(self, request: Request, *, takes_forms: bool) -> None:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        # A browser sends JSON, or a form with this header, of another site's page only after it has asked this server.
        is_form = takes_forms and kind == "multipart/form-data"
        if is_form and "authorization" not in request.headers:
            raise RequestError(415, "authorization: expected this header with a form, got none; send any key")
        if kind != "application/json" and not is_form:
            message = f"content-type: expected application/json, got {kind[:60]!r}; set the header"
            raise RequestError(415, message)
        packing = request.headers.get("content-encoding", "identity")
        if packing.lower() != "identity":
            message = f"content-encoding: expected none, got {packing[:60]!r}; send the body uncompressed"
            raise RequestError(415, message)
        length = request.headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20:
            self._check_size(int(length))

    async def _receive(self, request: Request, body: bytearray) -> None:
        async for chunk in request.stream():
            self.take(len(chunk))
            body += chunk
            self._check_size(len(body))

    def _check_size(self, num_bytes: int) -> None:
        most = self._settings.max_body
        if num_bytes > most:
            message = f"body: expected at most {most} bytes, got more; send smaller images"
            raise RequestError(413, message, code="body_too_large")


def form_parts(body: bytes | bytearray) -> dict[str, bytes | bytearray]:
    """Return the parts of a ``multipart/form-data`` body by name (RFC 7578), without their headers.

    Raises:
        RequestError: If the body is no such form, or a name comes twice.
    """
    boundary = body[: max(body.find(b"\r\n"), 0)]
    _, *pieces = (b"\r\n" + body).split(b"\r\n" + boundary, _MAX_FORM_PARTS + 2)
    parts: dict[str, bytes | bytearray] = {}
    for piece in pieces[:-1]:
        head, _, content = piece.partition(b"\r\n\r\n")
        if found := _PART_NAME.search(head[:_MAX_PART_HEAD]):
            parts[found[1].decode(errors="replace")] = content
    if not parts or len(parts) != len(pieces) - 1 or pieces[-1].rstrip() != b"--":
        expected = f"a form of at most {_MAX_FORM_PARTS} parts, each with a name of its own, and its end"
        raise RequestError(400, f"body: expected {expected}, got another; send it again", code="invalid_form")
    return parts
