"""Reads an image or a video from a data URL, an allowed folder of this machine, or an allowed host."""

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
from trio_edge.serving.requests.errors import RequestError, field_error
from trio_edge.serving.requests.remote import RemoteMedia

if TYPE_CHECKING:
    from trio_edge.serving.settings import ServerSettings

_DATA = re.compile(r"data:(image|video)/[\w.+-]+(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII | re.IGNORECASE)
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP")
"""Accepted formats; MPO is a JPEG with further images, which some phones write."""


@final
class MediaReader:
    """Reads images and videos as the server's policy allows. Any thread may use it."""

    def __init__(self, settings: ServerSettings, *, remote: RemoteMedia | None = None) -> None:
        """Take the policy; ``remote`` fetches from other hosts, by default as ``settings`` allow."""
        self._settings = settings
        self._remote = remote or RemoteMedia(
            settings.allowed_media_domains, seconds=settings.media_s, max_bytes=settings.max_body
        )

    def read(self, url: str, *, kind: str, where: str) -> bytes:
        """Return the bytes of the file at ``url``; ``kind`` is "image" or "video".

        Raises:
            RequestError: If the policy forbids it, or it cannot be read; the message begins with ``where``, the field.
        """
        if found := _DATA.match(url):
            if found[1].lower() != kind:
                raise _refused(where, f"a data URL of the type {kind}/…", f"{found[1].lower()}/…")
            return _decoded(url[found.end() :], where=where)
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "file" and self._settings.allowed_local_media_path is not None:
            return self._local(url, where=where)
        if scheme in ("http", "https") and self._settings.allowed_media_domains:
            return self._remote.fetch(url, where=where)
        raise _refused(where, f"data:{kind}/…;base64,…", f"{url[:40]!r}")

    def check_image(self, data: bytes, *, where: str, pixels_left: int) -> int:
        """Return the number of pixels of an image from its header, without decoding it.

        Raises:
            RequestError: If it has more than ``pixels_left`` or an unusual format.
            ImageError: If it is no image.
        """
        (width, height), kind = image_header(data, name=where)
        if kind not in _FORMATS:
            raise _refused(where, "a PNG, JPEG, WebP, GIF or BMP image", str(kind)[:20])
        if width * height > pixels_left:
            raise field_error(
                f"{where}: expected at most {self._settings.max_pixels} pixels in all images, got more with"
                f" {width}x{height}; scale it down",
                param="messages",
                code="image_too_large",
            )
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
            pass  # the same message as for a file outside of the folder, so that nobody learns which files exist
        raise _refused(where, "a readable file of --allowed-local-media-path", "another")

    def _file(self, path: Path, *, where: str) -> bytes:
        # The path is resolved, so a link must be new and is refused. A pipe would block.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError
            data = file.read(self._settings.max_body + 1)
        if len(data) > self._settings.max_body:
            raise _refused(where, f"at most {self._settings.max_body} bytes", "more")
        return data


def _decoded(text: str, *, where: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise _refused(where, "base64 after the comma", f"{type(error).__name__}") from None
    if not data:
        raise _refused(where, "a file", "an empty one")
    return data


def _refused(where: str, expected: str, got: str) -> RequestError:
    return field_error(f"{where}: expected {expected}, got {got}", param="messages", code="media_refused")
