"""Errors in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}`` and an HTTP status."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from trio_edge.runtime.bundle.errors import (
    BackendError,
    BundleError,
    ImageError,
    PromptTooLongError,
    TrioEdgeError,
    message_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
# Status, code and param for each runtime error. The first class that fits counts.
_RUNTIME_ERRORS: tuple[tuple[type[TrioEdgeError], int, str, str | None], ...] = (
    (PromptTooLongError, 400, "context_length_exceeded", "messages"),
    (ImageError, 400, "invalid_image", "messages"),
    (BackendError, 500, "backend_error", None),
    (BundleError, 500, "bundle_error", None),
    (TrioEdgeError, 400, "invalid_value", None),
)


@dataclass(eq=False)  # an exception is compared by identity
class RequestError(Exception):
    """A refused request, or a failed answer: an HTTP status and one line for people.

    ``code`` is one word for programs, and ``param`` the name of the wrong field.
    """

    status: int
    message: str
    _: KW_ONLY
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else message_line(self.param)
        return {
            "error": {"message": message_line(self.message), "type": kind, "param": param, "code": self.code}
        }

    @property
    def detail(self) -> dict[str, Any]:
        """The error in the form of System One: a list of wrong fields with the status 422, else one line."""
        line = message_line(self.message)
        if self.status != 422 or self.param is None:
            return {"detail": line}
        wrong = {
            "loc": ["body", *message_line(self.param).split(".")],
            "msg": line.removeprefix(f"{self.param}: "),
        }
        return {"detail": [{**wrong, "type": self.code}]}

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers of the error response."""
        if self.retry_after_s is not None:
            return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def invalid_value(param: str, problem: str) -> RequestError:
    """Return the error for a field with a wrong value."""
    return RequestError(400, f"{param}: {problem}", code="invalid_value", param=param)


def unknown_model(name: str, served: Iterable[str]) -> RequestError:
    """Return the error for a model that is not among the ``served`` ones."""
    message = f"model: expected one of {', '.join(served)}, got {name[:80]!r}"
    return RequestError(404, message, code="model_not_found", param="model")


def refused_media(where: str, problem: str, *, code: str = "media_refused") -> RequestError:
    """Return the error for an image or a video in the field ``where``."""
    return RequestError(400, f"{where}: {problem}", code=code, param="messages")


def request_error_from(error: Exception) -> RequestError:
    """Return the error response for any exception."""
    if isinstance(error, RequestError):
        return error
    for kind, status, code, param in _RUNTIME_ERRORS:
        if isinstance(error, kind):
            return RequestError(status, str(error), code=code, param=param)
    return RequestError(
        500,
        f"server: expected an answer, got {type(error).__name__}; the server's log has more",
        code="internal_error",
    )
