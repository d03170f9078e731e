"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` and an HTTP status."""

from __future__ import annotations

import math
from typing import Any

from trio_edge.runtime.bundle.errors import (
    BackendError,
    BundleError,
    ImageError,
    PromptTooLongError,
    TrioEdgeError,
)

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_OF_PIPELINE: tuple[tuple[type[TrioEdgeError], int, str, str | None], ...] = (
    (PromptTooLongError, 400, "context_length_exceeded", "messages"),
    (ImageError, 400, "invalid_image", "messages"),
    (BackendError, 500, "backend_error", None),
    (BundleError, 500, "bundle_error", None),
    (TrioEdgeError, 400, "invalid_value", None),
)
"""Status, code and param of a pipeline's errors; the first class that fits counts."""


class RequestError(Exception):
    """A request that is refused, or an answer that failed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """Describe the error to the client: HTTP status, one line, a code for programs, and the wrong field.

        Another try may succeed after ``retry_after_s`` seconds.
        """
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the error."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def field_error(message: str, *, param: str | None, code: str = "invalid_value") -> RequestError:
    """Return the error of a wrong field: status 400."""
    return RequestError(400, message, code=code, param=param)


def request_error_from(error: Exception) -> RequestError:
    """Return the error that a client sees for an error in a pipeline."""
    if isinstance(error, RequestError):
        return error
    for kind, status, code, param in _OF_PIPELINE:
        if isinstance(error, kind):
            return RequestError(status, str(error), code=code, param=param)
    return RequestError(
        500,
        f"server: expected an answer, got {type(error).__name__}; the server's log has more",
        code="internal_error",
    )
