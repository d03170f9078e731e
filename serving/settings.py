"""The limits and the policy of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server's limits for its clients. The defaults suit one device with one model."""

    api_key: str | None = None
    """Key that every request must have; None for no key."""
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Host names of a server without a key. Without this check, a web page could let its own name point to 127.0.0.1."""
    max_queue: int = 16
    """Most requests that wait for one model."""
    max_wait_s: float = 60.0
    """Expected wait in seconds above which a request is refused."""
    max_body: int = 20 * 2**20
    """Most bytes of a request's body, of a fetched file or of a local file."""
    max_bodies: int = 8
    """Limit of all bodies in memory together, in multiples of ``max_body``."""
    max_pixels: int = 50_000_000
    """Most pixels in all images of a request, checked before any is decoded."""
    max_parts: int = 256
    """Most messages and content parts of a request."""
    body_s: float = 30.0
    """Seconds that a client may take to send a body."""
    media_s: float = 10.0
    """Seconds that fetching one image may take, redirects included."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts to fetch images from; they must match exactly."""
    allowed_local_media_path: Path | None = None
    """Folder whose files clients may name with ``file://`` URLs."""
    shutdown_s: float = 30.0
    """Seconds for running answers to finish when the server stops."""
