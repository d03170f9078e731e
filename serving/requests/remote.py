"""Fetches images over HTTP from hosts that the operator allows, and never from a private network.

It resolves a host name once, requires that all its addresses are public, and connects to the checked address. A name that
resolves to another address later (DNS rebinding) therefore gains nothing. Each redirect is checked like the first address.
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

from trio_edge.serving.requests.errors import RequestError, refused_media

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


_MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 1 << 16


class _Address(NamedTuple):
    """A checked address: ``target`` is its path and query."""

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
        """Store the policy.

        Args:
            domains: Allowed hosts such as ``images.example``, or ``images.example:8443`` with a port.
            seconds: Time limit for one file, redirects included.
            max_bytes: Size limit for one file.
            resolve: Function from host and port to IP addresses; the system's resolver by default.
            is_allowed: Function that accepts or rejects an IP address; ``is_global`` by default.
        """
        self._domains = frozenset(domain.lower() for domain in domains)
        self._seconds, self._max_bytes = seconds, max_bytes
        self._resolve = resolve or _resolve
        self._is_allowed = is_allowed or is_global

    def fetch(self, url: str, *, where: str) -> bytes:
        """Return the file at ``url``. Messages name the request's field ``where``.

        Raises:
            RequestError: If the policy forbids the address, or the file cannot be fetched.
        """
        deadline = time.monotonic() + self._seconds
        for _ in range(_MAX_REDIRECTS + 1):
            address = self._checked(url, where=where)
            try:
                ip = self._public_ip(address, where=where)
                with _response(address, ip, deadline=deadline) as response:
                    if response.status not in _REDIRECTS:
                        data = self._read(response, where=where)
                        if time.monotonic() >= deadline:  # a file that the deadline cut may look whole
                            raise TimeoutError
                        return data
                    url = urljoin(url, response.headers.get("location", ""))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _refused(
                    where, f"an image from {address.host}", type(error).__name__, code="media_unreachable"
                ) from error
        raise _refused(where, f"at most {_MAX_REDIRECTS} redirects", "more", code="media_unreachable")

    def _checked(self, url: str, *, where: str) -> _Address:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise _refused(where, "an address", "a broken one") from None
        if parts.scheme not in _PORTS or parts.username is not None or parts.password is not None:
            raise _refused(where, "an http or https address without a user", "another scheme, or a user")
        default = _PORTS[parts.scheme]
        name = host if port in (None, default) else f"{host}:{port}"
        if name not in self._domains:
            raise _refused(where, "a host of --allowed-media-domains", repr(name[:80]))
        if not url.isascii() or any(character <= " " for character in url):
            raise _refused(where, "an address in ASCII without spaces", "other characters")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return _Address(parts.scheme, host, port or default, target)

    def _public_ip(self, address: _Address, *, where: str) -> str:
        ips = self._resolve(address.host, address.port)
        if not ips or not all(map(self._is_allowed, ips)):
            raise _refused(where, "a host with global addresses only", repr(address.host))
        return ips[0]

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
    """Return whether an IP address is public. An IPv4 address inside an IPv6 address must be public, too."""
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
def _response(address: _Address, ip: str, *, deadline: float) -> Iterator[http.client.HTTPResponse]:
    """Yield the response to a GET. A timer cuts the connection at the deadline, even while bytes arrive."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    host = address.host
    # TLS takes ``raw`` over and leaves it empty, so the timer holds a copy of the connection.
    with socket.create_connection((ip, address.port), timeout=left) as raw, raw.dup() as copy:
        # The socket's own timeout starts again with every read, so it does not bound a slow response.
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), _cut, [copy])
        timer.daemon = True
        timer.start()
        try:
            with contextlib.closing(http.client.HTTPConnection(host, address.port)) as connection:
                connection.sock = raw
                if address.scheme == "https":
                    connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
                headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
                connection.request("GET", address.target, headers=headers)
                with connection.getresponse() as response:
                    yield response
        finally:
            timer.cancel()


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _refused(where: str, expected: str, got: str, *, code: str = "media_refused") -> RequestError:
    return refused_media(where, f"expected {expected}, got {got}; send the image as a data URL", code=code)
