"""A server fetches images from allowed places only: none of the inside, by no trick with names, redirects or links."""

from __future__ import annotations

import io
import os
import shutil
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from tests.pictures import random_picture
from tests.serving.server import question, running
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.media import MediaReader
from trio_edge.serving.requests.remote import RemoteMedia, is_global
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def png() -> bytes:
    file = io.BytesIO()
    random_picture(48, 48).save(file, "PNG")
    return file.getvalue()


whole_drips: list[str] = []
"""Paths of the files that dripped to a client until their end."""


class _Web(BaseHTTPRequestHandler):
    """Pages of a web server: an image, redirects, and answers that are too large, too slow or none."""

    def do_GET(self) -> None:
        asked.append((self.path, self.headers["Host"]))
        page: Callable[[], None] = getattr(self, f"_{self.path.strip('/').split('?')[0].split(':')[0]}")
        page()

    def _image(self) -> None:
        self._send(200, png())

    def _missing(self) -> None:
        self._send(404, b"")

    def _redirect(self) -> None:
        self._send(302, b"", Location=self.path.partition("?")[2])

    def _short(self) -> None:
        self._send(200, b"half", **{"Content-Length": "8"})

    def _large(self) -> None:
        self._send(200, bytes(2_000_000))

    def _drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(100):
            try:
                self.wfile.write(b"x")
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.1)
        whole_drips.append(self.path)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        pass


asked: list[tuple[str, str]] = []


@contextmanager
def web(context: ssl.SSLContext | None = None) -> Iterator[int]:
    """Serve ``_Web`` on a port of loopback, over TLS with a context."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Web) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with web() as port:
        yield port


def reader(
    port: int, *, resolve: Callable[[str, int], list[str]] | None = None, **policy: Any
) -> RemoteMedia:
    """Return what fetches from images.example, a name of 203.0.113.7, which is the test's server.

    A real server has a global address, which a test has not: this one address of documentation stands for it.
    """
    names = {"images.example": ["127.0.0.1"], "inside.example": ["10.0.0.1"]}
    settings = {"seconds": 1.0, "max_bytes": 1_000_000, "is_allowed": lambda address: address == "127.0.0.1"}
    domains = [f"images.example:{port}", f"inside.example:{port}"]
    return RemoteMedia(domains, resolve=resolve or (lambda host, _: names[host]), **{**settings, **policy})


def test_an_image_of_an_allowed_host_is_fetched(port: int) -> None:
    url = f"http://images.example:{port}/image"
    assert reader(port).fetch(url, where="image") == png()
    assert asked[-1] == ("/image", f"images.example:{port}")
    again = f"http://images.example:{port}/redirect?{url}"
    assert reader(port).fetch(again, where="image") == png()


def test_a_file_that_ends_early_is_refused(port: int) -> None:
    with pytest.raises(RequestError, match="IncompleteRead"):
        reader(port).fetch(f"http://images.example:{port}/short", where="image")


REFUSED = {
    "host": ("http://other.example:{port}/image", "a host of --allowed-media-domains"),
    "host_by_suffix": ("http://images.example.evil.example:{port}/image", "a host of"),
    "host_by_prefix": ("http://evil.images.example:{port}/image", "a host of"),
    "host_by_user": ("http://images.example:{port}@127.0.0.1:{port}/image", "without a user"),
    "host_by_backslash": (
        "http://127.0.0.1:{port}\\@images.example:{port}/image",
        "without a user|a host of",
    ),
    "dotted_host": ("http://images.example.:{port}/image", "a host of"),
    "other_port": ("http://images.example:1/image", "a host of"),
    "scheme": ("ftp://images.example:{port}/image", "an http or https address"),
    "loopback": ("http://127.0.0.1:{port}/image", "a host of"),
    "loopback_in_ipv6": ("http://[::1]:{port}/image", "a host of"),
    "mapped_loopback": ("http://[::ffff:127.0.0.1]:{port}/image", "a host of"),
    "decimal_loopback": ("http://2130706433:{port}/image", "a host of"),
    "metadata_service": ("http://169.254.169.254/latest", "a host of"),
    "inside": ("http://inside.example:{port}/image", "global addresses only"),
    "broken_port": ("http://images.example:99999/image", "an address"),
    "line_break": ("http://images.example:{port}/image?\r\nX: y", "without spaces"),
    "missing": ("http://images.example:{port}/missing", "HTTP status 404"),
    "redirect_to_loopback": (
        "http://images.example:{port}/redirect?http://127.0.0.1:{port}/image",
        "a host of",
    ),
    "redirect_to_inside": (
        "http://images.example:{port}/redirect?http://inside.example:{port}/image",
        "global addresses only",
    ),
    "redirect_to_file": ("http://images.example:{port}/redirect?file:///etc/passwd", "an http or https"),
    "large": ("http://images.example:{port}/large", "at most 1000000 bytes"),
    "drip": ("http://images.example:{port}/drip", "an image from images.example"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_address_is_refused(port: int, case: str) -> None:
    url, expected = REFUSED[case]
    whole_drips.clear()
    with pytest.raises(RequestError, match=expected) as raised:
        reader(port).fetch(url.replace("{port}", str(port)), where="messages[0]")
    assert raised.value.status == 400
    assert not whole_drips


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl for a certificate; runs in CI")
def test_a_file_that_drips_over_https_is_cut_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-subj", "/CN=images.example", "-addext", "subjectAltName=DNS:images.example"]
    subprocess.run([*new, *named, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with web(context) as port:
        url = f"https://images.example:{port}"
        assert reader(port).fetch(f"{url}/image", where="image") == png()
        whole_drips.clear()
        with pytest.raises(RequestError, match="an image from images"):
            reader(port).fetch(f"{url}/drip", where="image")
        assert not whole_drips


def test_endless_redirects_end(port: int) -> None:
    url = f"http://images.example:{port}/"
    for _ in range(5):
        url = f"http://images.example:{port}/redirect?{url}"
    with pytest.raises(RequestError, match="at most 3 redirects"):
        reader(port).fetch(url, where="messages[0]")


def test_the_address_that_was_checked_is_the_one_that_is_asked(port: int) -> None:
    """A name whose address changes between check and connection (DNS rebinding) gains nothing: it is resolved once."""
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    url = f"http://images.example:{port}/image"
    assert reader(port, resolve=lambda *_: next(answers)).fetch(url, where="image") == png()
    assert next(answers) == ["10.0.0.1"]


def test_one_inner_address_among_several_is_enough_to_refuse(port: int) -> None:
    with pytest.raises(RequestError, match="global addresses only"):
        reader(port, resolve=lambda *_: ["127.0.0.1", "10.0.0.1"]).fetch(
            f"http://images.example:{port}/image", where="image"
        )


def test_names_of_loopback_are_refused_by_the_systems_resolver() -> None:
    with pytest.raises(RequestError, match="global addresses only"):
        RemoteMedia(["localhost"], seconds=1.0, max_bytes=1).fetch("http://localhost/a", where="image")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_an_address_of_the_inside_is_not_global(address: str) -> None:
    assert not is_global(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_an_address_of_the_internet_is_global(address: str) -> None:
    assert is_global(address)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An allowed folder with an image, and things next to it and in it that must not be read."""
    inside = tmp_path / "images"
    (inside / "deeper").mkdir(parents=True)
    (inside / "deeper" / "an image.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "images-2").mkdir()
    (tmp_path / "images-2" / "a.png").write_bytes(png())
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    (inside / "out").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    (inside / "large").write_bytes(bytes(2_000_000))
    return inside


def local(folder: Path) -> MediaReader:
    return MediaReader(ServerSettings(allowed_local_media_path=folder, max_body=1_000_000))


def test_a_file_of_the_allowed_folder_is_read(folder: Path) -> None:
    for url in (
        f"file://{folder}/deeper/an%20image.png",
        f"file://localhost{folder}/deeper/../deeper/an image.png",
    ):
        assert local(folder).read(url, kind="image", where="image") == png()


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("../secret.png", "a readable file of"),
        ("%2e%2e/secret.png", "a readable file of"),
        ("../images-2/a.png", "a readable file of"),
        ("link.png", "a readable file of"),
        ("out/secret.png", "a readable file of"),
        ("pipe", "a readable file of"),
        ("deeper", "a readable file of"),
        ("missing.png", "a readable file of"),
        ("a%00b", "a readable file of"),
        ("x" * 5000, "a readable file of"),
        ("deeper/an%20image.png?query", "a readable file of"),
        ("large", "at most 1000000 bytes"),
    ],
)
def test_a_file_outside_of_it_or_of_another_kind_is_refused(folder: Path, path: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected):
        local(folder).read(f"file://{folder}/{path}", kind="image", where="image")


def test_a_file_of_another_machine_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="a readable file of"):
        local(folder).read(f"file://server{folder}/deeper/an%20image.png", kind="image", where="image")


def test_a_server_answers_about_fetched_and_local_images(
    reduced_bundle: Path, folder: Path, port: int
) -> None:
    settings = ServerSettings(allowed_media_domains=("images.example",), allowed_local_media_path=folder)
    media = MediaReader(settings, remote=reader(port))
    with running({"reduced": lambda: Pipeline.from_bundle(reduced_bundle)}, settings, media=media) as server:
        urls = (f"http://images.example:{port}/image", f"file://{folder}/deeper/an%20image.png")
        answers = [server.ask(messages=question("w1", url), max_tokens=4) for url in urls]
        assert [answer[0] for answer in answers] == [200, 200]
        assert answers[0][1]["choices"] == answers[1][1]["choices"]
        status, body = server.ask(messages=question("w1", "http://127.0.0.1/a"))
        assert (status, body["error"]["code"]) == (400, "media_refused")
