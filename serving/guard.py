"""Access control: refuses requests without the API key or, on a server without one, with a foreign host name."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING, final

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from trio_edge.serving.requests.errors import RequestError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from trio_edge.serving.settings import ServerSettings

# The page asks for the key itself. Probes of an orchestrator have none.
_OPEN_PATHS = frozenset({"/", "/health", "/health/ready"})


@final
class Guard:
    """Middleware that checks the API key or the host name."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer with status 401 or 421."""
        if scope["type"] == "http" and (error := self._error(scope)) is not None:
            response = JSONResponse(error.body, error.status, headers=error.headers)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _error(self, scope: Scope) -> RequestError | None:
        headers, key = Headers(scope=scope), self._settings.api_key
        if key is None:
            return None if self._is_allowed_host(headers.get("host", "")) else _FOREIGN_HOST
        if scope["path"] in _OPEN_PATHS:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # In constant time against timing attacks. As bytes, because compare_digest refuses text beyond ASCII.
        is_same = hmac.compare_digest(given.strip().encode(), key.encode())
        return None if scheme.lower() == "bearer" and is_same else _NO_KEY

    def _is_allowed_host(self, host: str) -> bool:
        name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
        return name.lower() in self._settings.allowed_hosts


_NO_KEY = RequestError(401, "api key: expected this server's, got another or none", code="invalid_api_key")
_FOREIGN_HOST = RequestError(
    421,
    "host: expected localhost, got another name; start trio-serve with --api-key to allow it",
    code="invalid_host",
)
