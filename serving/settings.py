"""The limits and the policy of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits that a server sets its clients. The defaults suit one device with one model."""

    api_key: str | None = None
    """Key that every request must carry; None for no key."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Names by which a server without a key may be called: a web page can give its own name the address 127.0.0.1."""
    max_queue: int = 16
    """Requests of one model that may wait."""
    max_wait_s: float = 60.0
    """Expected wait in seconds above which a request is refused."""
    max_body: int = 20 * 2**20
    """Bytes of a request's body, of a fetched file and of a local file."""
    max_bodies: int = 8
    """All bodies in memory together may have this many times ``max_body``."""
    max_pixels: int = 50_000_000
    """Pixels of all images of a request together, checked before any is decoded."""
    max_parts: int = 256
    """Messages and content parts of a request."""
    body_s: float = 30.0
    """Seconds that a client may take to send a body."""
    media_s: float = 10.0
    """Seconds that fetching one image may take, redirects included."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts, written exactly so, from which images are fetched."""
    allowed_local_media_path: Path | None = None
    """Folder whose files ``file://`` addresses may name."""
    shutdown_s: float = 30.0
    """Seconds that running answers have to finish when the server stops."""
