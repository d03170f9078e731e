"""Fetches an image over HTTP from hosts that the operator allowed, and never from an internal address.

A name is resolved once, all its addresses must be global, and the connection goes to the checked address. So a name that
later resolves to another address gains nothing. Each redirect is checked like the first URL.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, final
from urllib.parse import urljoin, urlsplit

from trio_edge.serving.requests.errors import RequestError, field_error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MOST_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16


class _Place(NamedTuple):
    scheme: str
    host: str
    port: int
    target: str


@final
class RemoteMedia:
    """Fetches files from allowed hosts."""

    def __init__(
        self,
        domains: Sequence[str],
        *,
        seconds: float,
        max_bytes: int,
        resolve: Callable[[str, int], list[str]] | None = None,
        is_allowed: Callable[[str], bool] | None = None,
    ) -> None:
        """Take the policy.

        Args:
            domains: Hosts such as ``images.example``, or with a port ``images.example:8443``.
            seconds: Time limit for one file, including redirects.
            max_bytes: Limit for one file.
            resolve: Returns the addresses of a host and a port; by default the system's resolver.
            is_allowed: Returns whether an address is allowed; by default ``is_global``.
        """
        self._domains = frozenset(domain.lower() for domain in domains)
        self._seconds, self._max_bytes = seconds, max_bytes
        self._resolve = resolve or _resolve
        self._is_allowed = is_allowed or is_global

    def fetch(self, url: str, *, where: str) -> bytes:
        """Return the file at ``url``.

        Raises:
            RequestError: If the policy forbids it, or it cannot be fetched; the message begins with ``where``, the field.
        """
        deadline = time.monotonic() + self._seconds
        for _ in range(MOST_REDIRECTS + 1):
            place = self._checked(url, where=where)
            try:
                with _response(place, self._address(place, where=where), deadline=deadline) as response:
                    if response.status not in _REDIRECTS:
                        data = self._read(response, where=where)
                        if time.monotonic() >= deadline:  # a truncated file may look complete
                            raise TimeoutError
                        return data
                    url = urljoin(url, response.headers.get("location", ""))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _refused(
                    where, f"an image from {place.host}", f"{type(error).__name__}", code="media_unreachable"
                ) from error
        raise _refused(where, f"at most {MOST_REDIRECTS} redirects", "more", code="media_unreachable")

    def _checked(self, url: str, *, where: str) -> _Place:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _refused(where, "an address", "a broken one") from None
        if parts.scheme not in _PORTS or parts.username is not None or parts.password is not None:
            raise _refused(where, "an http or https address without a user", "another")
        default = _PORTS[parts.scheme]
        name = host if port in (None, default) else f"{host}:{port}"
        if name not in self._domains:
            raise _refused(where, "a host of --allowed-media-domains", repr(name[:80]))
        if not url.isascii() or any(character <= " " for character in url):
            raise _refused(where, "an address in ASCII without spaces", "another")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Place(parts.scheme, host, port or default, target)

    def _address(self, place: _Place, *, where: str) -> str:
        addresses = self._resolve(place.host, place.port)
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise _refused(where, "a host with global addresses only", f"another ({place.host})")
        return addresses[0]

    def _read(self, response: http.client.HTTPResponse, *, where: str) -> bytes:
        if response.status != 200:
            raise _refused(where, "an image", f"HTTP status {response.status}", code="media_unreachable")
        chunks, size = [], 0
        while chunk := response.read1(_CHUNK):
            size += len(chunk)
            if size > self._max_bytes:
                raise _refused(where, f"at most {self._max_bytes} bytes", "more", code="media_too_large")
            chunks.append(chunk)
        if response.length:
            raise http.client.IncompleteRead(b"", response.length)
        return b"".join(chunks)


def is_global(address: str) -> bool:
    """Return whether an IP address is public, including IPv4 addresses within IPv6 addresses."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if not all(_is_public(v4) for v4 in inner if v4 is not None):
            return False
        if ip.ipv4_mapped is not None:
            return True
    return _is_public(ip)


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@contextlib.contextmanager
def _response(place: _Place, address: str, *, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """Yield the response to a GET; the connection is cut at the deadline, however slowly bytes arrive."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    raw = socket.create_connection((address, place.port), timeout=left)
    cut = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [raw])
    cut.daemon = True
    cut.start()
    try:
        connection = http.client.HTTPConnection(place.host, place.port)
        connection.sock = _secured(raw, place.host) if place.scheme == "https" else raw
        connection.request("GET", place.target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        with contextlib.closing(connection), connection.getresponse() as response:
            yield response
    finally:
        cut.cancel()
        raw.close()


def _secured(raw: socket.socket, host: str) -> socket.socket:
    return ssl.create_default_context().wrap_socket(raw, server_hostname=host)


def _cut(raw: socket.socket) -> None:
    with contextlib.suppress(OSError):
        raw.shutdown(socket.SHUT_RDWR)


def _refused(where: str, expected: str, got: str, *, code: str = "media_refused") -> RequestError:
    message = f"{where}: expected {expected}, got {got}; send the image as a data URL"
    return field_error(message, param="messages", code=code)
