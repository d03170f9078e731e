"""Bodies, headers and bytes that clients send: each gets an answer or an error in OpenAI's form, and the server goes on."""

from __future__ import annotations

import base64
import gzip
import io
import json
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from PIL import Image

from tests.fuzz.images import _data, _saved
from tests.fuzz.subject import Outcome, Subject, is_clear, judged
from tests.fuzz.values import damaged, hostile, mutated, places
from tests.serving.server import RunningServer, running
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    import random

_SETTINGS = ServerSettings(max_body=4_000_000, max_pixels=1_000_000, body_s=0.5)
_PATHS = ("/v1/chat/completions",) * 12 + ("/v1/responses",) * 4 + ("/v1/decisions",) * 5 + ("/v1/systemone",) * 5 + (
    "/v1/models", "/v1/models/tiny", "/v1/models/%2e%2e/x", "/health", "/health/ready", "/metrics", "/", "/version", "/x" * 3000,
    "/v1//chat/completions", "*", "http://evil/v1/models",
)  # fmt: skip
_HEADERS = (
    ("Host", "[::1].evil"), ("Host", "localhost:8000@evil"), ("Host", ""), ("Host", "a" * 9000), ("Authorization", "Bearer "),
    ("Authorization", "Basic x"), ("Content-Type", "text/plain"), ("Content-Type", "multipart/form-data; boundary=x"),
    ("Content-Encoding", "gzip"), ("Expect", "100-continue"), ("Expect", "x"), ("Transfer-Encoding", "chunked"),
    ("Transfer-Encoding", "identity"), ("Transfer-Encoding", "chunked, chunked"), ("Content-Length", "0"), ("Content-Length", "-1"),
    ("Content-Length", "99999999999999999999"), ("Content-Length", "1e3"), ("X-Request-Id", "a" * 5000), ("X-Request-Id", "\x01"),
    ("Accept", "text/event-stream"), ("Origin", "http://evil"), ("Upgrade", "websocket"), ("Connection", "Upgrade"),
)  # fmt: skip
_ALLOWED = frozenset(
    {
        200,
        400,
        401,
        403,
        404,
        405,
        406,
        408,
        411,
        413,
        414,
        415,
        417,
        421,
        422,
        426,
        429,
        431,
        501,
        503,
        504,
        505,
    }
)
_PAUSE_S = 1.0


def request(rng: random.Random, subject: Subject) -> Outcome:
    """One exchange with a server of this process, and a look at whether it is still ready."""
    server = _server(subject)
    return judged(lambda: _exchanged(rng, server))


def _server(subject: Subject) -> RunningServer:
    """Return the process's server, started with the first request."""
    if not hasattr(subject, "server"):
        load = partial(Pipeline.from_bundle, subject.bundle, backend="onnxruntime", threads=1)
        subject.server = subject.open_things.enter_context(running({"tiny": load}, _SETTINGS))
    server: RunningServer = subject.server  # type: ignore[attr-defined]
    return server


def _exchanged(rng: random.Random, server: RunningServer) -> str:
    data = _request(rng)
    received = _sent(server, data, rng)
    kind = _checked(received, data)
    status, _ = server.exchange(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert status == 200, f"not ready after {data[:600]!r}"
    return kind


def _sent(server: RunningServer, data: bytes, rng: random.Random) -> bytes:
    """Send a request, in some pieces, and return what comes back; nothing if the server closes or waits for more."""
    received = b""
    with server.connect() as connection:
        connection.settimeout(3 * _PAUSE_S)
        try:
            at = rng.randrange(len(data) + 1) if rng.random() < 0.1 else len(data)
            connection.sendall(data[:at])
            connection.sendall(data[at:])
            if rng.random() < 0.05:  # a client that leaves
                return b""
            if rng.random() < 0.05:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                received += piece
                connection.settimeout(_PAUSE_S)  # a connection that is kept open ends here
        except OSError:  # the server has closed the connection
            pass
    return received


def _checked(received: bytes, data: bytes) -> str:
    """Check the server's answer to ``data`` and return how it ended."""
    if not received:
        return "ok"
    head, _, body = received.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    if status == 100:
        return _checked(body, data)
    where = f"{status} {body[:300]!r} after {data[:600]!r}"
    assert status in _ALLOWED, where
    assert b"Traceback" not in body, where
    is_json = b"content-type: application/json" in head.lower()
    if status >= 400:
        if is_json and not data.startswith((b"HEAD", b"GET")):
            told = json.loads(_unchunked(head, body))
            if "detail" in told:  # System One's form
                problem = told["detail"][0] if status == 422 else {"msg": told["detail"]}
                assert is_clear(problem["msg"]), where
            else:
                assert set(told["error"]) == {"message", "type", "param", "code"}, where
                assert is_clear(told["error"]["message"]), where
        return "clear"
    if is_json and body and not data.startswith(b"HEAD"):
        json.loads(_unchunked(head, body))
    return "ok"


def _unchunked(head: bytes, body: bytes) -> bytes:
    """Return the body of the first response, if more follow."""
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return body[: int(line.split(b":")[1])]
    whole, rest = b"", body
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        if (count := int(size, 16)) == 0:
            break
        whole, rest = whole + rest[:count], rest[count + 2 :]
    return whole


def _request(rng: random.Random) -> bytes:
    if rng.random() < 0.03:
        return rng.randbytes(rng.choice((1, 30, 3000))) + b"\r\n\r\n"
    path, method = (
        rng.choice(_PATHS),
        rng.choice(("POST",) * 12 + ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "BREW")),
    )
    body = _body(rng, path)
    headers = [("Host", "localhost"), ("Connection", "close"), ("Content-Type", "application/json")]
    lines = [*headers, ("Content-Length", str(len(body)))]
    if rng.random() < 0.25:
        odd = rng.choice(_HEADERS)
        lines = [line for line in lines if rng.random() < 0.7 or line[0] != odd[0]] + [odd]
        if odd == ("Transfer-Encoding", "chunked"):
            body = f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
        if odd[0] == "Content-Encoding":
            body = gzip.compress(body)
    version = rng.choice(("HTTP/1.1",) * 30 + ("HTTP/1.0", "HTTP/9.9", "HTTP/2", ""))
    text = f"{method} {path} {version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines)
    data = text.encode("utf-8", "surrogatepass") + b"\r\n" + body
    return damaged(rng, data) if rng.random() < 0.05 else data


def _body(rng: random.Random, path: str) -> bytes:
    kinds = {"/v1/responses": _response, "/v1/decisions": _decision, "/v1/systemone": _system_one}
    fields = kinds.get(path, _chat)(rng)
    kind = rng.randrange(12)
    if kind == 0:
        return damaged(rng, json.dumps(fields).encode())
    if kind == 1:
        level = rng.choice((10, 40, 5000, 60_000))
        return rng.choice((b"[" * level, b'{"a":' * level, b"[" * level + b"]" * level))
    if kind == 2:
        return rng.choice(
            (
                b"",
                b"null",
                b"[]",
                b"0",
                b'"a"',
                b"\xef\xbb\xbf{}",
                b"{}" * 2,
                b"\xff\xfe",
                b'{"model": 1e999}',
            )
        )
    for _ in range(rng.choice((0, 1, 1, 2))):
        fields[rng.choice(sorted(_extra(rng)))] = rng.choice((hostile(rng), *_extra(rng).values()))
    if kind < 6:
        fields = mutated(rng, fields, places(fields))
    data = json.dumps(fields).encode("utf-8", "surrogatepass")[:3_900_000]
    if path == "/v1/systemone" and rng.random() < 0.2:
        head = b'--b\r\ncontent-disposition: form-data; name="%s"\r\n\r\n'
        parts = [(b"request", data), (b"asset-0", _data(rng))][: rng.choice((1, 2, 2))]
        data = b"".join(head % name + content + b"\r\n" for name, content in parts) + b"--b--"
    return data


def _chat(rng: random.Random) -> dict[str, Any]:
    content: Any = [
        {"type": "image_url", "image_url": {"url": _url(rng)}},
        {"type": "text", "text": "what is this?"},
    ]
    messages = [{"role": "user", "content": content if rng.random() < 0.6 else "what?"}]
    fields: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 3}
    kind = rng.randrange(10)
    if kind < 3:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    elif kind == 3:
        of_json = {"name": "a", "schema": _schema(rng)}
        fields["response_format"] = {"type": "json_schema", "json_schema": of_json}
    elif kind == 4:
        fields["structured_outputs"] = {"choice": ["red", "blue"] * rng.choice((1, 50))}
    return fields


def _response(rng: random.Random) -> dict[str, Any]:
    content = [
        {"type": "input_image", "image_url": _url(rng)},
        {"type": "input_text", "text": "what is this?"},
    ]
    turn = {"type": "message", "role": "user", "content": "a"}
    return {
        "model": "tiny",
        "input": rng.choice(("what?", [{"role": "user", "content": content}], [turn])),
        "max_output_tokens": 3,
        **({"stream": True} if rng.random() < 0.3 else {}),
        **({"instructions": "short", "text": {"format": {"type": "json_object"}}} if rng.random() < 0.2 else {}),
    }  # fmt: skip


def _decision(rng: random.Random) -> dict[str, Any]:
    parts = [
        {"type": "input_image", "image_url": _url(rng), "detail": "auto"},
        {"type": "input_json", "data": {"a": [1, None, "é"]}},
        {"type": "input_text", "text": "what is this?"},
    ]
    turns = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    questions = [
        {"type": "predicate", "instructions": "is it red?", "name": "a"},
        {"type": "choice", "instructions": rng.choice(("?", parts)), "choices": [{"value": value} for value in ("yes", "no")]},
        {"type": "score", "instructions": "?", "levels": [{"label": label, "description": "x"} for label in ("0", "1", "2")]},
    ]  # fmt: skip
    number = rng.choice((1,) * 9 + (2, 2, 400))
    return {
        "model": "tiny",
        "input": rng.choice(("what?", turns, turns[:1])),
        "questions": rng.choices(questions, k=number),
        **(
            {"trio": {"sharing": rng.choice(("each", "joint")), "both_orders": True}}
            if rng.random() < 0.3
            else {}
        ),
    }


def _system_one(rng: random.Random) -> dict[str, Any]:
    text = rng.choice(("what?", "photo", {"a": ["see photo", 1]}, [], ""))
    questions = {
        "a": {"type": "noul", "instructions": text, "criteria": {"true": "yes", "false": text}},
        "b.c": {"type": "choice", "instructions": "?", "criteria": {"yes": None, "no": text}},
        "": {"type": "score", "criteria": ["0", "1", text]},
        "box": {"type": "box"},
    }
    asset = rng.choice(
        ({"type": "image", "part": "asset-0"}, {"format": "png", "data_base64": _url(rng).partition(",")[2]})
    )
    return {
        "model": "tiny",
        "state": rng.choice(("photo", text)),
        "questions": {name: questions[name] for name in rng.sample(sorted(questions), rng.choice((1, 2, 4)))},
        **({"assets": {rng.choice(("photo", "photo", "p", "", "\n")): asset}} if rng.random() < 0.7 else {}),
    }  # fmt: skip


def _extra(rng: random.Random) -> dict[str, Any]:
    """Return fields that a client may add, with values in range."""
    return {
        "n": 2, "logprobs": True, "top_logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": -1, "logit_bias": {"5": 3},
        "temperature": 1.5, "top_p": 0.3, "top_k": 4, "seed": 2**63 - 1, "stop": ["a", "b"], "min_tokens": 2, "ignore_eos": True,
        "repetition_penalty": 1.2, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "service_tier": "auto",
        "modalities": ["text"], "metadata": {"a": "b"}, "store": False, "user": "u", "min_p": 0, "prompt_cache_key": "k",
        "trio": {"kept": True}, "max_completion_tokens": 2, "response_format": {"type": "json_object"},
        "structured_outputs": {"choice": ["x" * rng.choice((1, 300, 1_200_000))] * rng.choice((1, 3))}, "guided_choice": ["a"],
    }  # fmt: skip


def _schema(rng: random.Random) -> dict[str, Any]:
    number = rng.choice((1, 3, 20_000))
    return rng.choice((
        {"type": "object", "properties": {"a": {"enum": list(range(number))}}}, {"const": "y" * number}, {"$ref": "#"},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9},
        {"type": "string", "pattern": "(a+)+$" * min(number, 50)},
        {"type": "string", "maxLength": 10**9, "minLength": number}, {"anyOf": [{"type": "null"}] * number}, {"allOf": []},
    ))  # fmt: skip


def _url(rng: random.Random) -> str:
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(
            (
                "file:///etc/passwd",
                "http://127.0.0.1:9/a.png",
                "data:",
                "data:image/png;base64,",
                "x",
                "ftp://a/b",
            )
        )
    if kind == 1:
        return f"data:video/mp4;base64,{base64.b64encode(rng.randbytes(30)).decode()}"
    data = (
        _data(rng)
        if kind == 2
        else _saved(rng, (40, 30), rng.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF")), "RGB")
    )
    if kind == 3:
        file = io.BytesIO()
        Image.new("L", (1, 100_000)).save(file, "PNG")
        data = file.getvalue()
    return f"data:image/{rng.choice(('png', 'jpeg', 'svg+xml'))};base64,{base64.b64encode(data).decode()}"
