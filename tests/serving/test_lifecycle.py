"""Start, keys and end of a server: what it says when it cannot start, and what happens to answers when it stops."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.serving.server import question, running, slowed, until
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving import cli
from trio_edge.serving.app import make_app
from trio_edge.serving.options import named_bundles
from trio_edge.serving.server import BundleServer, listen, serve
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = Path(sys.executable).parent / "trio-serve"


@contextmanager
def started(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command on a free port; yield the process and the address that it tells."""
    command = [str(COMMAND), *map(str, arguments), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.match(r"trio-serve: (http://\S+/v1) answers with reduced \(onnxruntime\)$", line)
        assert found, line
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def many(url: str, count: int) -> list[Any]:
    """Ask ``count`` times at once; return answers or exceptions."""
    messages: Any = question("w1")
    with (
        openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ThreadPoolExecutor(count) as clients,
    ):

        def ask(_: int) -> Any:
            try:
                return client.chat.completions.create(
                    model="reduced", messages=messages, extra_body={"ignore_eos": True}
                )
            except openai.OpenAIError as error:
                return error

        return list(clients.map(ask, range(count)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_lets_all_answers_finish(reduced_bundle: Path, number: signal.Signals) -> None:
    with started(f"reduced={reduced_bundle}") as (process, url), ThreadPoolExecutor(1) as waiting:
        many(url, 1)
        answers = waiting.submit(many, url, 8)
        until(lambda: num_taken(url) == 1 + 8)  # a connection without a request is closed at once
        process.send_signal(number)
        texts = {answer.choices[0].message.content for answer in answers.result()}
        assert len(texts) == 1
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def num_taken(url: str) -> int:
    """Return how many requests a server has answered, answers now, or will answer."""
    metrics = fetched(url.replace("/v1", "/metrics"))[1]
    counted = r"trio_(?:requests_total|waiting_requests|running_requests)\{[^}]*\} (\d+)"
    return sum(map(int, re.findall(counted, metrics)))


def fetched(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_an_answer_that_takes_longer_than_the_time_limit_is_cut_with_an_error(reduced_bundle: Path) -> None:
    def load() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.5)

    messages: Any = question("w1")
    ended: list[tuple[str, Exception]] = []
    with ThreadPoolExecutor(3) as clients, running({"reduced": load}) as server:
        create = partial(server.client().chat.completions.create, model="reduced", messages=messages)

        def ask(name: str, **fields: Any) -> None:
            try:
                _ = list(create(**fields))
            except openai.APIError as error:
                ended.append((name, error))

        asked = [clients.submit(ask, "streamed", stream=True)]
        until(lambda: server.workers["reduced"]._running != {})
        asked += [clients.submit(ask, "waiting"), clients.submit(ask, "waiting and streamed", stream=True)]
        until(lambda: len(server.workers["reduced"]._waiting) == 2)
    assert sorted(name for name, _ in ended) == ["streamed", "waiting", "waiting and streamed"]
    for _, error in ended:
        assert "server: stopped before the answer's end" in str(error)


def test_a_server_is_ready_when_its_bundles_are_loaded(reduced_bundle: Path) -> None:
    may_load = threading.Event()

    def load_late() -> Pipeline:
        assert may_load.wait(30)
        return Pipeline.from_bundle(reduced_bundle)

    with loading({"reduced": load_late}) as (url, workers):
        until(lambda: fetched(f"{url}/health")[0] == 200)
        assert fetched(f"{url}/health/ready")[0] == 503
        status, body = fetched(f"{url}/v1/models")
        assert (status, json.loads(body)["data"][0]["trio"]) == (200, None)
        assert many(f"{url}/v1", 1)[0].code == "loading"
        may_load.set()
        until(lambda: fetched(f"{url}/health/ready")[0] == 200)
        assert workers["reduced"].is_ready


def test_a_signal_while_a_bundle_loads_ends_the_server_in_silence(reduced_bundle: Path) -> None:
    may_load, announced = threading.Event(), list[str]()

    def load_late() -> Pipeline:
        assert may_load.wait(30)
        return Pipeline.from_bundle(reduced_bundle)

    app, listener = make_app({"reduced": load_late}), listen("127.0.0.1", 0)
    server = BundleServer(app, shutdown_s=1.0)
    stopped = server.workers[0].stop

    def stop(*, timeout_s: float) -> None:
        may_load.set()  # the bundle is ready while the server stops
        server.workers[0].loaded.result(30)
        stopped(timeout_s=timeout_s)

    server.workers[0].stop = stop  # type: ignore[method-assign]
    thread = ThreadPoolExecutor(1)
    serving = thread.submit(serve, server, listener, on_ready=lambda: announced.append("ready"))
    until(lambda: server.started)
    server.handle_exit(signal.SIGTERM, None)
    serving.result(30)
    thread.shutdown()
    assert announced == []


def test_a_bundle_has_the_name_of_the_link_that_leads_to_it(
    reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = tmp_path / "small"
    link.symlink_to(reduced_bundle)
    assert named_bundles([str(link)]) == {"small": link}
    assert list(named_bundles([f"{link}/", f"other={link}"])) == ["small", "other"]
    monkeypatch.chdir(reduced_bundle)
    assert list(named_bundles(["."])) == [reduced_bundle.name]


@contextmanager
def loading(models: Any) -> Iterator[tuple[str, Any]]:
    """Serve models without waiting until they are loaded."""
    app, listener = make_app(models), listen("127.0.0.1", 0)
    server = BundleServer(app, shutdown_s=1.0)
    thread = threading.Thread(target=serve, args=(server, listener), kwargs={"on_ready": lambda: None})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", app.state.workers
    server.should_exit = True
    thread.join(30)
    listener.close()


def test_a_key_is_asked_for(reduced_bundle: Path) -> None:
    settings = ServerSettings(api_keys=("secret",))
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}, settings) as server:
        for path, status in (
            ("/health", 200),
            ("/health/ready", 200),
            ("/metrics", 401),
            ("/v1/models", 401),
        ):
            assert fetched(server.url + path)[0] == status
        for given in ("none", "sec", "secret2"):
            with pytest.raises(openai.AuthenticationError, match="api key: expected") as raised:
                server.client(api_key=given).models.list()
            assert raised.value.code == "invalid_api_key"
        assert server.client(api_key="secret").models.list().data[0].id == "reduced"
        # with a key any name will do, as a proxy or a container may have another
        assert fetched(f"{server.url}/health", Host="robot.local")[0] == 200


CANNOT_START: dict[str, tuple[list[str], str]] = {
    "no_bundle": (["/nowhere/bundle"], "bundle"),
    "same_name_twice": (["a={bundle}", "a={bundle}"], "expected different names, got 'a' twice"),
    "no_key_for_others": (["{bundle}", "--host", "0.0.0.0"], "expected --api-key with 0.0.0.0"),
    "empty_key_for_others": (["{bundle}", "--host", "::", "--api-key", ""], "--api-key: expected ASCII"),
    "key_of_other_letters": (["{bundle}", "--api-key", "clé"], "--api-key: expected ASCII"),
    "foreign_host": (["{bundle}", "--host", "192.0.2.1"], "expected an address of this machine"),
    "no_host": (["{bundle}", "--host", "no such host"], "expected an address of this machine"),
    "taken_port": (["{bundle}", "--port", "{taken}"], "expected an address of this machine and a free port"),
    "unknown_backend": (["{bundle}", "--backend", "abacus"], "abacus"),
    "too_many_kept_images": (["{bundle}", "--keep-images", "1000"], "keep_images: expected 0..64"),
    "no_folder": (["{bundle}", "--allowed-local-media-path", "/nowhere"], "/nowhere"),
    "address_in_place_of_a_host": (
        ["{bundle}", "--allowed-media-domains", "https://images.example/a"],
        "--allowed-media-domains: expected a host",
    ),
}


@pytest.mark.parametrize("case", CANNOT_START)
def test_a_server_that_cannot_start_says_why_in_one_line(
    reduced_bundle: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = CANNOT_START[case]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"bundle": str(reduced_bundle), "taken": str(taken.getsockname()[1])}
        given = ["--port", "0", *(argument.format(**names) for argument in arguments)]
        assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) == 1
