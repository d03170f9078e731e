"""The bytes of an image or a video: from a data URL, an allowed local folder, or an allowed host."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, final
from urllib.parse import unquote, urlsplit

from trio_edge.runtime.images.reading import image_header
from trio_edge.serving.requests.errors import refused_media
from trio_edge.serving.requests.remote import RemoteMedia

if TYPE_CHECKING:
    from trio_edge.serving.settings import ServerSettings

_DATA = re.compile(r"data:(image|video)/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
# MPO is a JPEG with further images, as some phones write it.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")


@final
class MediaReader:
    """Reads images and videos within the server's policy. It is thread-safe."""

    def __init__(self, settings: ServerSettings, *, remote: RemoteMedia | None = None) -> None:
        """Store the policy. ``remote`` reads from other hosts, by default with the policy of ``settings``."""
        self._settings = settings
        self._remote = remote or RemoteMedia(
            settings.allowed_media_domains, seconds=settings.media_s, max_bytes=settings.max_body
        )

    def read(self, url: str, *, kind: str, where: str) -> bytes:
        """Return the bytes of a file.

        Args:
            url: A data URL, or a ``file://``, ``http://`` or ``https://`` address.
            kind: "image" or "video".
            where: The request's field, for messages.

        Raises:
            RequestError: If the policy forbids the address, or the file cannot be read.
        """
        if found := _DATA.match(url):
            if (given := found[1].lower()) != kind:
                problem = f"expected a data URL of the type {kind}/…, got {given}/…; send it as {given}_url"
                raise refused_media(where, problem)
            return _decoded(url[found.end() :], where=where)
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "file" and self._settings.allowed_local_media_path is not None:
            return self._local(url, where=where)
        if scheme in ("http", "https") and self._settings.allowed_media_domains:
            return self._remote.fetch(url, where=where)
        options = {"file": "--allowed-local-media-path", "http": "--allowed-media-domains"}
        option = options.get(scheme.removesuffix("s"))
        advice = f", or start trio-serve with {option}" if option else ""
        problem = f"expected data:{kind}/…;base64,…, got {url[:40]!r}; send a data URL{advice}"
        raise refused_media(where, problem)

    def check_image(self, data: bytes, *, where: str, pixels_left: int) -> int:
        """Return the number of pixels in an image's header. It decodes nothing.

        Raises:
            RequestError: If the image has more than ``pixels_left`` or a format that is not allowed.
            ImageError: If the data is not an image.
        """
        (width, height), kind = image_header(data, name=where)
        if kind not in _FORMATS:
            problem = f"expected a PNG, JPEG, WebP, GIF or BMP image, got {str(kind)[:20]}; convert it"
            raise refused_media(where, problem)
        if width * height > pixels_left:
            limit = f"expected at most {self._settings.max_pixels} pixels in all images"
            problem = f"{limit}, got more with {width}x{height}; scale it down"
            raise refused_media(where, problem, code="image_too_large")
        return width * height

    def _local(self, url: str, *, where: str) -> bytes:
        root = self._settings.allowed_local_media_path
        assert root is not None
        parts = urlsplit(url)
        try:
            path = Path(unquote(parts.path, errors="strict")).resolve(strict=True)
            is_inside = parts.netloc in ("", "localhost") and path.is_relative_to(root.resolve(strict=True))
            if is_inside and not parts.query and not parts.fragment:
                return self._file(path, where=where)
        except (OSError, ValueError, RuntimeError):
            pass  # the same message as for a file outside, so that nobody learns which files exist
        problem = "expected a readable file of --allowed-local-media-path, got another; send a data URL"
        raise refused_media(where, problem)

    def _file(self, path: Path, *, where: str) -> bytes:
        # The path is resolved: a link found here now was put there since. Opening a pipe would block.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError
            data = file.read(self._settings.max_body + 1)
        if len(data) > self._settings.max_body:
            problem = f"expected at most {self._settings.max_body} bytes, got more; send a smaller file"
            raise refused_media(where, problem)
        return data


def _decoded(text: str, *, where: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        problem = "expected base64 after the comma, got something else; encode the file again"
        raise refused_media(where, problem) from None
    if not data:
        raise refused_media(where, "expected a file, got an empty one; send the file's bytes")
    return data
