"""The page as an HTTP response. Its Content-Security-Policy allows only the page's own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse, Response

if TYPE_CHECKING:
    from starlette.requests import Request

_POLICY = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_HEADERS = {
    "cache-control": "no-cache",
    "permissions-policy": "camera=(self)",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


async def page(_request: Request) -> Response:
    """Return the page."""
    text = _page_text()
    policy = f"{_POLICY}; script-src {_digest(text, 'script')}; style-src {_digest(text, 'style')}"
    return HTMLResponse(text, headers={**_HEADERS, "content-security-policy": policy})


@cache
def _page_text() -> str:
    return resources.files("trio_edge.serving.page").joinpath("index.html").read_text(encoding="utf-8")


def _digest(text: str, tag: str) -> str:
    """Return the digest that allows the page's only ``tag`` element in a policy."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"
