"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` and an HTTP status."""

from __future__ import annotations

import math
from typing import Any

from trio_edge.runtime.bundle.errors import (
    BackendError,
    BundleError,
    ImageError,
    PromptTooLongError,
    ShapeError,
    TrioEdgeError,
)

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


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
        """Take what the client is told.

        Args:
            status: Of HTTP.
            message: One line.
            code: A word for programs.
            param: The field that is wrong.
            retry_after_s: Seconds after which another try may succeed.
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
        """HTTP headers that belong to it."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def request_error_from(error: Exception) -> RequestError:
    """Return what a client is told of an error in a pipeline."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, PromptTooLongError):
        return RequestError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, ImageError):
        return RequestError(400, str(error), code="invalid_image", param="messages")
    if isinstance(error, ShapeError):
        return RequestError(400, str(error), code="invalid_value")
    if isinstance(error, BackendError):
        return RequestError(500, str(error), code="backend_error")
    if isinstance(error, BundleError):
        return RequestError(500, str(error), code="bundle_error")
    if isinstance(error, TrioEdgeError):
        return RequestError(400, str(error), code="invalid_value")
    return RequestError(
        500,
        f"server: expected an answer, got {type(error).__name__}; the server's log has more",
        code="internal_error",
    )
