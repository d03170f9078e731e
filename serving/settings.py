"""The limits and the policy of a server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits for requests and clients. The defaults suit one device with one model."""

    api_keys: tuple[str, ...] = ()
    """Keys, one of which every request must carry; none for a server without a key."""
    # A web page of another site can give its own host name the address 127.0.0.1.
    allowed_hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "::1")
    """Host names that a server without a key accepts."""
    max_queue: int = 16
    """Maximum number of waiting requests for each model."""
    busy_queue: int | None = None
    """Number of waiting requests from which those with the level "auto" run at the lowest level only; None for no number."""
    max_wait_s: float = 60.0
    """Longest expected wait in seconds; a request that would wait longer is refused."""
    max_body: int = 20 * 2**20
    """Maximum bytes of a request's body, of a fetched file and of a local file."""
    max_bodies: int = 8
    """Maximum memory for all bodies together, as a multiple of ``max_body``."""
    max_pixels: int = 50_000_000
    """Maximum pixels of all images of a request together, checked before any is decoded."""
    max_parts: int = 256
    """Maximum number of messages and content parts of a request together."""
    clamp_max_tokens: bool = False
    """Whether a limit on new tokens above the bundle's is lowered to it; otherwise it is refused."""
    allowed_origins: tuple[str, ...] = ()
    """Origins such as ``https://robot.example`` whose web pages may ask; "*" for all."""
    body_s: float = 30.0
    """Seconds that a client may take to send a body, and to accept a part of the answer."""
    media_s: float = 10.0
    """Seconds that fetching one image may take, redirects included."""
    allowed_media_domains: tuple[str, ...] = ()
    """Exact host names from which images may be fetched."""
    allowed_local_media_path: Path | None = None
    """Folder whose files ``file://`` addresses may name."""
    shutdown_s: float = 30.0
    """Seconds that running answers may take to finish when the server stops."""
