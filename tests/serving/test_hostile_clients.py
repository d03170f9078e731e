"""Malformed, oversized, slow and vanishing clients get an error in OpenAI's form, and the server lives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import io
import json
import re
import socket
import struct
import time
import zlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.pictures import random_picture
from tests.serving.server import image_url, question, running, slowed, until
from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving import server as server_module
from trio_edge.serving.app import make_app
from trio_edge.serving.requests import body as body_module
from trio_edge.serving.requests.body import BodyReader
from trio_edge.serving.requests.protocol import parse_chat
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serving.server import RunningServer

SETTINGS = ServerSettings(max_body=600_000, max_pixels=100_000, body_s=1.0, max_bodies=2)


@pytest.fixture(scope="module")
def strict(reduced_bundle: Path) -> Iterator[RunningServer]:
    """A server with small limits."""
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}, SETTINGS) as server:
        yield server


@pytest.fixture(autouse=True)
def _lives(strict: RunningServer) -> Iterator[None]:
    yield
    status, answer = strict.ask(max_tokens=2)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)


def assert_refused(result: tuple[int, dict[str, Any]], status: int, expected: str) -> None:
    got, body = result
    assert got == status, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(expected, error["message"]), error
    assert "\n" not in error["message"]
    assert len(error["message"]) < 1000


def png_of_zeros(width: int, height: int, *, num_rows: int | None = None) -> str:
    """Return a small file that decodes to many pixels, or says so and has fewer rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    rows = (
        b"".join(compressor.compress(bytes(width + 1)) for _ in range(num_rows or height))
        + compressor.flush()
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


GOOD = {"model": "reduced", "messages": [{"role": "user", "content": "w1"}]}
BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "body: expected JSON"),
    "no_json": (b"what is this?", 400, "body: expected JSON"),
    "cut_short": (json.dumps(GOOD).encode()[:-5], 400, "body: expected JSON"),
    "two_values": (json.dumps(GOOD).encode() * 2, 400, "body: expected JSON"),
    "a_list": (b"[]", 400, "body: Expected `object`"),
    "bad_utf8": (b'{"model": "\xff\xfe"}', 400, "body: expected JSON in UTF-8"),
    "lone_surrogate": (
        rb'{"model": "reduced", "messages": [{"role": "user", "content": "\ud800"}]}',
        400,
        "body: expected JSON|Unicode",
    ),
    "deep_lists": (b'{"model": ' + b"[" * 90_000, 400, "model: Expected `str`|body"),
    "deep_schema": (
        b'{"model": "reduced", "messages": [{"role": "user", "content": "w1"}], "response_format": {"type": "json_schema",'
        b' "json_schema": {"schema": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"}}}",
        400,
        "levels",
    ),
    "forty_levels": (
        json.dumps({**GOOD, "response_format": {"type": "json_schema", "json_schema": {"schema": 0}}})
        .replace('"schema": 0', '"schema": ' + '{"a":' * 40 + "{}" + "}" * 40)
        .encode(),
        400,
        "at most 32 levels",
    ),
    "number_as_text": (json.dumps({**GOOD, "max_tokens": "5"}).encode(), 400, "max_tokens: Expected `int"),
    "huge_number": (json.dumps({**GOOD, "max_tokens": 10**30}).encode(), 400, "max_tokens|body"),
    "not_a_number": (b'{"model": "reduced", "temperature": NaN}', 400, "body: expected JSON"),
    "long_field_name": (json.dumps({**GOOD, "x" * 5000: 1}).encode(), 400, "not a field of this server"),
    "line_breaks_in_a_field": (json.dumps({**GOOD, "a\nb": 1}).encode(), 400, "not a field"),
    "unknown_part": (
        json.dumps(
            {**GOOD, "messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}
        ).encode(),
        400,
        r"messages\[\.\.\.\]\.content|messages\[0\].content\[0\]|Invalid value 'input_audio'",
    ),
    "ten_thousand_parts": (
        json.dumps(
            {**GOOD, "messages": [{"role": "user", "content": [{"type": "text", "text": "w"}] * 5000}]}
        ).encode(),
        400,
        "messages: expected at most 256 messages and parts, got 5001",
    ),
    "too_large": (json.dumps(GOOD).encode() + b" " * 600_000, 413, "body: expected at most 600000 bytes"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_malformed_body_is_refused(strict: RunningServer, case: str) -> None:
    body, status, expected = BODIES[case]
    assert_refused(strict.post(body), status, expected)


def test_ten_thousand_parts_are_refused(server: RunningServer) -> None:
    parts = [{"type": "image_url", "image_url": {"url": image_url(random_picture(2, 2))}}] * 10_000
    result = server.ask(messages=[{"role": "user", "content": parts}])
    assert_refused(result, 400, "at most 256 messages and parts, got 10001")


def test_a_body_that_hides_its_length_is_cut_off_too(strict: RunningServer) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert_refused(strict.exchange(head + chunk * 12), 413, "at most 600000 bytes")


def test_another_content_type_is_refused_which_web_pages_could_send_unasked(strict: RunningServer) -> None:
    result = strict.post(json.dumps(GOOD).encode(), Content_Type="text/plain")
    assert_refused(result, 415, "expected application/json, got 'text/plain'")


def test_a_refusal_reaches_a_client_that_sends_on(strict: RunningServer) -> None:
    """Without reading its body the connection would be reset, and the client would not know why."""
    body = json.dumps(GOOD).encode() + b" " * 20_000_000
    assert_refused(strict.post(body), 413, "at most 600000 bytes")
    assert_refused(strict.post(body, Host="evil.example"), 421, "host: expected")


def test_a_foreign_host_name_is_refused(strict: RunningServer) -> None:
    assert_refused(strict.post(json.dumps(GOOD).encode(), Host="evil.example"), 421, "host: expected")


def test_no_http_at_all_is_refused(strict: RunningServer) -> None:
    with strict.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def jpeg_of_scans(count: int) -> str:
    """Return a progressive JPEG whose last scan comes again and again."""
    file = io.BytesIO()
    random_picture(48, 48).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scans = data[data.rfind(b"\xff\xda") : -2] * count
    return f"data:image/jpeg;base64,{base64.b64encode(data[:-2] + scans + data[-2:]).decode()}"


IMAGES: dict[str, tuple[str, str]] = {
    "bomb": (
        png_of_zeros(6000, 6000),
        r"expected at most 100000 pixels in all images, got more with 6000x6000",
    ),
    "larger_bomb": (png_of_zeros(20_000, 20_000, num_rows=10), "pixels, got more"),
    "thousand_scans": (jpeg_of_scans(1000), "at most 100 scans"),
    "no_image": ("data:image/png;base64,bm90IGFuIGltYWdl", "no known format"),
    "half_an_image": (image_url()[:-4000], "damaged|base64"),
    "empty": ("data:image/png;base64,", "expected a file, got an empty one"),
    "no_base64": ("data:image/png;base64,????", "expected base64"),
    "other_characters": ("data:image/png;base64,äö", "expected base64"),
    "not_base64_encoded": ("data:image/png,abc", "expected data:image/…;base64"),
    "text": ("data:text/html;base64,PGh0bWw+", "expected data:image/…;base64"),
    "a_video": ("data:video/mp4;base64,AAAA", "expected a data URL of the type image"),
    "a_path": ("/etc/passwd", "expected data:image"),
    "a_file": ("file:///etc/passwd", "send a data URL, or start trio-serve with --allowed-local-media-path"),
    "over_http": ("http://images.example/a.png", "or start trio-serve with --allowed-media-domains"),
    "over_https": ("https://images.example/a.png", "or start trio-serve with --allowed-media-domains"),
    "postscript": (
        f"data:image/png;base64,{base64.b64encode(b'%!PS-Adobe-3.0 EPSF-3.0').decode()}",
        "no known format",
    ),
    "unusual_format": (image_url(random_picture(20, 20), format="TIFF"), "expected a PNG, JPEG, WebP"),
}


def test_an_image_of_one_long_row_is_refused_before_it_is_decoded(server: RunningServer) -> None:
    result = server.ask(messages=question("w1", png_of_zeros(1, 40_000_000, num_rows=10)))
    assert_refused(result, 400, "sides of at most 131072 pixels")


@pytest.mark.parametrize("case", IMAGES)
def test_a_bad_image_is_refused(strict: RunningServer, case: str) -> None:
    url, expected = IMAGES[case]
    assert_refused(strict.ask(messages=question("w1", url)), 400, expected)


def test_pixels_of_all_images_count_together(strict: RunningServer) -> None:
    image = image_url(random_picture(200, 200), format="JPEG")
    result = strict.ask(messages=question("w1", image, image, image))
    assert_refused(result, 400, r"messages\[0\].content\[2\]: expected at most 100000 pixels in all")


def test_a_body_that_does_not_come_ends_the_request(strict: RunningServer) -> None:
    with strict.connect() as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000\r\n\r\n{"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("head", "body", "status"),
    [
        (HEAD.replace(b"localhost", b"evil.example") + b"Content-Length: 1000\r\n\r\n", b"{", b"421"),
        (HEAD.replace(b"/json", b"/pdf") + b"Content-Length: 1000\r\n\r\n", b"{", b"415"),
        (HEAD + b"Content-Length: 1000\r\n\r\n", b"{", b"408"),
        (
            HEAD.replace(b"POST /v1/chat/completions", b"GET /health") + b"Content-Length: 9\r\n\r\n",
            b"{",
            b"200",
        ),
        (
            HEAD.replace(b"localhost", b"evil") + b"Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
            b"",
            b"421",
        ),
        (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"400"),
    ],
    ids=["host", "type", "slow", "a GET", "100-continue", "two lengths"],
)
def test_a_response_before_the_bodys_end_closes_the_connection(
    strict: RunningServer, monkeypatch: pytest.MonkeyPatch, head: bytes, body: bytes, status: bytes
) -> None:
    """Otherwise a byte a second would hold the connection for ever, without a key."""
    monkeypatch.setattr(body_module, "_LINGER_S", 0.05)
    with strict.connect() as connection:
        connection.sendall(head + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))  # to the connection's end
    assert answer.split()[1] == status
    assert b"\r\nconnection: close\r\n" in answer


def test_a_whole_body_leaves_the_connection_open(strict: RunningServer) -> None:
    body = json.dumps({**GOOD, "max_tokens": 1})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", strict.port)) as connection:
        sockets = []
        for _ in range(2):
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            assert connection.getresponse().read().startswith(b'{"id"')
            sockets.append(connection.sock)
    assert sockets[0] is sockets[1] is not None


@pytest.mark.parametrize(
    "host", ["[::1].evil", "localhost:8000@evil", "localhost:", "[::1", "localhost:80:80", ""]
)
def test_a_host_that_only_looks_like_this_machine_is_refused(strict: RunningServer, host: str) -> None:
    assert_refused(strict.post(json.dumps(GOOD).encode(), Host=host), 421, "host: expected")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_a_host_of_this_machine_is_answered(strict: RunningServer, host: str) -> None:
    assert strict.post(json.dumps({**GOOD, "max_tokens": 1}).encode(), Host=host)[0] == 200


def test_an_unknown_version_of_http_is_refused(strict: RunningServer) -> None:
    request = b"GET /health HTTP/9.9\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert_refused(strict.exchange(request), 505, "expected HTTP/1.1")


def test_an_answer_is_sent_at_once_on_a_connection_that_is_kept() -> None:
    """Nagle's algorithm would hold its end back until the client has acknowledged its beginning, after 40 ms."""

    async def accepted() -> bool:
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def take(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            found.set_result(bool(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
            writer.close()

        with server_module.listen("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(take, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await found

    assert asyncio.run(accepted())


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}}


PATTERNS = [{"pattern": f".*{number}.*"} for number in range(16)]
"""llguidance 1.9 needs seconds for 16 that must hold together, and hours for 30."""
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "long_choice": ({"structured_outputs": {"choice": ["x" * 1025]}}, "length <= 1024"),
    "many_values": (schema({"enum": [f"v{number}" for number in range(10_000)]}), "at most 65536 bytes"),
    "long_const": (schema({"const": "x" * 70_000}), "at most 65536 bytes"),
    "patterns": (schema({"type": "string", "allOf": PATTERNS}), "at most 12 patterns and formats, got 16"),
    "pattern_properties": (
        schema({"patternProperties": {f"^{number}": {} for number in range(13)}}),
        "at most 12 patterns and formats, got 13",
    ),
    "multiple": (schema({"type": "integer", "multipleOf": 1_000_003}), "multipleOf"),
    "huge_multiple": (schema({"type": "integer", "multipleOf": 10**300 + 1}), "multipleOf"),
    "two_multiples": (schema({"allOf": [{"multipleOf": 10_007}, {"multipleOf": 10_009}]}), "multipleOf"),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_form_that_would_hold_the_bundle_is_refused(strict: RunningServer, case: str) -> None:
    fields, expected = FORMS[case]
    assert_refused(strict.ask(**fields), 400, expected)


@pytest.mark.parametrize("value", [0.01, 25, 2500, 0.25, 9999, 0.0001, True, {"type": "integer"}, "text"])
def test_a_small_multiple_is_no_reason_to_refuse(value: Any) -> None:
    body = json.dumps({**GOOD, **schema({"type": "number", "multipleOf": value})}).encode()
    assert parse_chat(body, max_parts=9).response_format is not None


def test_a_request_that_fails_for_its_own_reasons_leaves_the_bundle_ready(
    reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}) as server:
        pipeline = server.workers["reduced"].loaded.result()
        for error in (BundleError("tokenizer: too many rules"), ValueError("a bug")):
            with monkeypatch.context() as patched:
                patched.setattr(pipeline.tokenizer, "plain_ids", partial(_raise, error))
                for _ in range(3):
                    assert server.ask(structured_outputs={"choice": ["w1"]})[0] == 500
            assert server.workers["reduced"].is_ready


def _raise(error: Exception, *_: object) -> None:
    raise error


def test_headers_that_drip_end_the_connection(strict: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HEADER_S", 0.3)
    with strict.connect() as connection:
        for byte in b"POST / HTTP/1.1\r\n":
            try:
                connection.sendall(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.05)
        assert connection.recv(100) == b""


def test_bodies_together_have_a_limit(reduced_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = BodyReader.take

    def noted(memory: BodyReader, count: int) -> None:
        take(memory, count)
        taken.append(count)

    monkeypatch.setattr(BodyReader, "take", noted)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 599999\r\n\r\n"
    patient, load = replace(SETTINGS, body_s=60.0), partial(Pipeline.from_bundle, reduced_bundle)
    asked = json.dumps({**GOOD, "max_tokens": 1}).encode() + b" " * 1000
    with running({"reduced": load}, patient) as server:
        with server.connect() as one, server.connect() as other:
            for connection in (one, other):
                connection.sendall(head + b" " * 599_998)
            until(lambda: sum(taken) == 2 * 599_998)
            status, body = server.post(asked)
            assert (status, body["error"]["code"]) == (429, "server_busy")
        until(lambda: server.post(asked)[0] == 200)


def test_a_client_that_vanishes_frees_its_place_at_the_next_token(reduced_bundle: Path) -> None:
    def load() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.1)

    with running({"reduced": load}, ServerSettings(max_queue=1)) as server:
        worker = server.workers["reduced"]
        for is_streamed in (True, False):
            body = json.dumps({**GOOD, "stream": is_streamed, "ignore_eos": True, "max_tokens": 40}).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            with server.connect() as running_one, server.connect() as waiting_one:
                for connection in (running_one, waiting_one):
                    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
                    until(lambda: worker._running != {})
                until(lambda: len(worker._waiting) == 1)
                status, refused = server.ask()
                assert (status, refused["error"]["code"]) == (429, "queue_full")
            # 40 tokens take 4 s, both 8 s
            until(lambda: worker._running == {} and not worker._waiting, seconds=3.0)
        assert server.ask(max_tokens=1)[0] == 200


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_never_reads_is_given_up(reduced_bundle: Path, is_streamed: bool) -> None:
    body = json.dumps({**GOOD, "stream": is_streamed, "max_tokens": 5}).encode()
    received = [{"type": "http.request", "body": body, "more_body": False}]
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers}

    async def receive() -> Any:
        return received.pop() if received else await asyncio.sleep(60)

    waited_whole = False

    async def send(_: Any) -> None:
        nonlocal waited_whole
        await asyncio.sleep(60)
        waited_whole = True

    async def ask() -> None:
        models = {"reduced": partial(Pipeline.from_bundle, reduced_bundle)}
        app = make_app(models, ServerSettings(body_s=0.3))
        async with app.router.lifespan_context(app):
            await asyncio.wrap_future(app.state.workers["reduced"].loaded)
            await app(
                {**scope, "http_version": "1.1", "query_string": b"", "asgi": {"version": "3.0"}},
                receive,
                send,
            )

    asyncio.run(ask())
    assert not waited_whole


def test_a_pipeline_that_fails_is_a_server_error_and_the_other_model_answers(
    reduced_bundle: Path, keep_all_bundle: Path
) -> None:
    bundles = {"reduced": reduced_bundle, "full": keep_all_bundle}
    with running({name: partial(Pipeline.from_bundle, path) for name, path in bundles.items()}) as server:
        worker = server.workers["reduced"]
        worker.loaded.result().close()
        for _ in range(3):
            assert_refused(server.ask(), 500, "pipeline: expected an open one")
        assert not worker.is_ready
        assert server.ask(model="full")[0] == 200
