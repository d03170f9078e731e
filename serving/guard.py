"""Refuses requests without the key or, on a server without a key, with a foreign host name."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from trio_edge.serving.settings import ServerSettings

_OPEN_PATHS = frozenset({"/", "/health", "/health/ready"})
"""Paths without a key: the page asks for the key itself, and an orchestrator's probes have none."""


@final
class Guard:
    """Middleware that checks the key and the host name."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 401 or 421."""
        if scope["type"] == "http" and (error := self._error(scope)) is not None:
            refusal = JSONResponse(error.body, error.status, headers=error.headers)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> RequestError | None:
        headers, key = Headers(scope=scope), self._settings.api_key
        if key is None:
            return None if self._is_allowed_host(headers.get("host", "")) else _FOREIGN_HOST
        if scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Compared in constant time, as bytes, because compare_digest refuses non-ASCII text.
        is_same = hmac.compare_digest(given.strip().encode(), key.encode())
        return None if scheme.lower() == "bearer" and is_same else _NO_KEY

    def _is_allowed_host(self, host: str) -> bool:
        name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        return name.lower() in self._settings.allowed_hosts


_NO_KEY = RequestError(401, "api key: expected this server's, got another or none", code="invalid_api_key")
_FOREIGN_HOST = RequestError(
    421, "host: expected this server's name, got another; start it with --api-key", code="invalid_host"
)
