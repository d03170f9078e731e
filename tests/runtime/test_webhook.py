"""The webhook: events arrive in order, and a server that is slow, missing or wrong loses events but stops nothing."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from tests.camera_server import serving
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.cli import webhook
from trio_edge.runtime.cli.webhook import Webhook

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook.time, "sleep", lambda _seconds: None)


def nothing(_connection: int) -> Sequence[bytes]:
    return []


@pytest.mark.parametrize("path", ["", "/", "/api/webhook/gate", "/hook?token=a%20b&c", "?a=b"])
def test_events_arrive_in_order(path: str) -> None:
    notes: list[str] = []
    with serving(nothing) as server:
        hook = Webhook(server.address + path, notes.append)
        for number in range(20):
            hook.post(b"%d" % number)
        hook.close()
        assert server.posts == [b"%d" % number for number in range(20)]
        assert set(server.post_paths) == {path if path.startswith("/") else f"/{path}"}
    assert notes == []


@pytest.mark.parametrize("status", [400, 404, 500, 301, 302, 303, 307, 308])
def test_a_refusal_is_told_once_after_three_tries(status: int) -> None:
    notes: list[str] = []
    with serving(nothing) as server, serving(nothing) as other:
        server.status, server.headers["Location"] = status, other.address
        hook = Webhook(server.address, notes.append)
        hook.post(b"1")
        hook.post(b"2")
        hook.close()
        assert server.posts == [b"1"] * webhook.MOST_TRIES + [b"2"] * webhook.MOST_TRIES
        assert (other.posts, other.paths) == ([], [])  # redirects are not followed
    assert len(notes) == 1
    assert notes[0].startswith(
        f"webhook {server.address}: expected an answer 200, got HTTPError: HTTP Error {status}: "
    )
    assert notes[0].endswith("; events are lost until it comes")


def test_after_a_delivery_the_next_loss_is_told_again() -> None:
    notes: list[str] = []
    with serving(nothing) as server:
        hook = Webhook(server.address, notes.append)
        for status in (500, 500, 200, 500):
            server.status = status
            hook.post(b"")
            wait_until_delivered(hook)
        hook.close()
    assert len(notes) == 2


def wait_until_delivered(hook: Webhook) -> None:
    """Wait until the thread has taken an event of its own and the one before it is done."""
    reached = threading.Event()

    class Body(bytes):
        def __len__(self) -> int:
            reached.set()
            return 0

    hook.post(Body())
    assert reached.wait(60)


@pytest.mark.parametrize("kind", ["closed", "silent", "no HTTP"])
def test_a_server_that_is_none_is_told_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "SECONDS_TO_ANSWER", 0.2)
    notes: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if kind == "closed":
            server.close()
        elif kind == "no HTTP":
            threading.Thread(target=talk, args=(server,), daemon=True).start()
        hook = Webhook(f"http://127.0.0.1:{port}/", notes.append)
        hook.post(b"1")
        hook.post(b"2")
        hook.close()
    assert len(notes) == 1
    assert notes[0].startswith(f"webhook http://127.0.0.1:{port}: expected an answer 200, got ")


def talk(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed
            return
        with connection:
            connection.recv(1)
            connection.sendall(b"hello, who is there?\r\n\r\n")


def test_a_slow_server_drops_events_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "SECONDS_TO_CLOSE", 0.0)
    monkeypatch.setattr(webhook, "SECONDS_TO_ANSWER", 60.0)
    notes: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        hook = Webhook(f"http://127.0.0.1:{server.getsockname()[1]}/", notes.append)
        for _ in range(webhook.MOST_WAITING + 50):  # a waiting post would never return
            hook.post(b"")
        assert hook._waiting.qsize() == webhook.MOST_WAITING
        hook.close()
    assert len(notes) == 1
    assert "got no answer in time; events are lost until it comes" in notes[0]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "gate",
        "localhost:8123/hook",
        "ftp://127.0.0.1/",
        "file:///etc/passwd",
        "http://",
        "http:///hook",
        "https://user:secret@127.0.0.1/",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nHost: other",
        "http://127.0.0.1\\@other/",
        "http://127.0.0.1/\u00fc",
        "http://127.0.0.1/\0",
    ],
)
def test_another_address_is_one_line(address: str) -> None:
    with pytest.raises(DataError, match=r"^webhook: expected http://host/path") as caught:
        Webhook(address, lambda _note: None)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:port/", "http://[::1/"])
def test_a_host_that_is_none_is_told_when_it_is_used(address: str) -> None:
    notes: list[str] = []
    hook = Webhook(address, notes.append)
    hook.post(b"")
    hook.close()
    assert len(notes) == 1
