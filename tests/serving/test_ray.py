"""Replicas with Ray Serve: ``trio-serve --replicas 2`` on this machine, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import random_picture
from tests.serving.server import image_url, question, until
from tests.serving.test_decisions import PICTURE
from tests.serving.test_levels import DOUBTFUL
from trio_edge.runtime.bundle.errors import ShapeError, install_command
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving import cli
from trio_edge.serving.fleet.cluster import FleetSettings, check_room
from trio_edge.serving.metrics import Metrics
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("ray", reason=f"Ray is not installed; {install_command('ray')}")
if (os.cpu_count() or 1) < 2:
    pytest.skip("two replicas need two cores; runs on machines that have them", allow_module_level=True)

COMMAND = Path(sys.executable).parent / "trio-serve"
NUM_QUEUED = 4
LONG = 900
"""Tokens of an answer that takes seconds."""


class Fleet:
    """A running ``trio-serve --replicas 2``."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(self, text: str, *urls: str, **fields: Any) -> str:
        messages: Any = question(text, *urls)
        answer = self.client.chat.completions.create(model="small", messages=messages, **fields)
        return answer.choices[0].message.content or ""

    def stream(self, text: str, **fields: Any) -> Any:
        messages: Any = question(text)
        return self.client.chat.completions.create(model="small", messages=messages, stream=True, **fields)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        values = {sample.name: sample.value for family in families for sample in family.samples}
        return values.get(name, 0.0)

    def replica_ids(self) -> list[int]:
        """Return the process ids of the replicas."""
        return [pid for pid in descendants(self.process.pid) if "ServeReplica" in command_line(pid)]


def descendants(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        threads = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
        found = {int(child) for group in (children, *threads) for child in group}
        return [*found, *(below for child in found for below in descendants(child))]
    return []


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


@pytest.fixture(scope="module")
def long_bundle(checkpoint: Path) -> Path:
    """The reduced bundle with room for answers that take seconds."""
    from tests.bundles import export
    from trio_edge.runtime.bundle.schedule import Schedule, Stage

    stages = (Stage(layer=1, keep=14), Stage(layer=2, keep=6))
    return export(checkpoint, schedule=Schedule(stages=stages), max_new_tokens=LONG)


@pytest.fixture(scope="module")
def fleet(long_bundle: Path) -> Iterator[Fleet]:
    """Two replicas."""
    with running_fleet(long_bundle, 2, "--max-queue", str(NUM_QUEUED)) as fleet:
        yield fleet


@contextlib.contextmanager
def running_fleet(bundle: Path, num_replicas: int, *options: str) -> Iterator[Fleet]:
    """Serve a bundle as "small"; at the end SIGTERM must leave no process."""
    options = ("--replicas", str(num_replicas), "--threads", "1", "--port", "0", *options)
    process = subprocess.Popen([str(COMMAND), f"small={bundle}", *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.match(r"trio-serve: (http://\S+)/v1 answers with small \(onnxruntime\)$", line)
        assert found, line + process.stderr.read()
        fleet = Fleet(process, found[1])
        until(lambda: fleet.metric("trio_replicas") == num_replicas, seconds=30)
        yield fleet
        fleet.client.close()
        pids = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        until(lambda: not any("ray" in command_line(pid) for pid in pids), seconds=20)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def own(long_bundle: Path) -> Iterator[Pipeline]:
    """The same bundle in this process."""
    with Pipeline.from_bundle(long_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture
def two_long_answers(fleet: Fleet) -> Iterator[list[Any]]:
    """Both replicas busy: an iterator of one answer's chunks, and another's, each past its first text."""
    streams = [fleet.stream("w1 w2", extra_body={"ignore_eos": True}) for _ in range(2)]
    for stream in streams:
        next(chunk for chunk in stream if chunk.choices[0].delta.content)
    assert fleet.metric("trio_running_requests") == 2
    yield streams
    for stream in streams:
        stream.close()
    until(lambda: fleet.metric("trio_running_requests") == 0)


def test_answers_are_those_of_the_pipeline(fleet: Fleet, own: Pipeline) -> None:
    images = [random_picture(40 + size, 48, seed=size) for size in range(4)]
    cases = [(images[seed % 4], f"w{seed % 7} w{seed % 5 + 8}", seed) for seed in range(24)]
    drawn = {"temperature": 1.0, "seed": 3}
    expected = [own.generate(image, text, max_new_tokens=6, **drawn).text for image, text, _ in cases]

    def ask(case: Any) -> str:
        image, text, _ = case
        return fleet.ask(text, image_url(image), max_tokens=6, **drawn)

    with ThreadPoolExecutor(3) as clients:
        assert list(clients.map(ask, cases)) == expected
    assert len(set(expected)) > 12


def test_an_answer_streams_and_its_usage_counts_the_wait(fleet: Fleet, own: Pipeline) -> None:
    options = {"include_usage": True}
    *chunks, last = fleet.stream("w1 w2", max_tokens=6, stream_options=options)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == own.generate(None, "w1 w2", max_new_tokens=6).text
    assert len([text for text in texts if text]) > 1
    assert last.usage.queue_ms > 0


def test_decisions_are_those_of_the_pipeline(fleet: Fleet, own: Pipeline) -> None:
    image, asked = random_picture(48, 48), fleet.metric("trio_questions_total")
    content: Any = [{"type": "input_image", "image_url": image_url(image)}]
    questions: Any = [
        {"type": "choice", "instructions": text, "choices": [{"value": "w5"}, {"value": "w6"}]}
        for text in ("w1", "w2", "w3")
    ]
    found = fleet.client.decisions.create(
        model="small", input=[{"role": "user", "content": content}], questions=questions
    )
    expected = own.decide(image, [Question.choice(text, ["w5", "w6"]) for text in ("w1", "w2", "w3")])
    for answer, decision in zip(found.answers, expected, strict=True):
        assert answer.type == "choice"
        shares = [one.probability for one in answer.probabilities]
        assert shares == pytest.approx(decision.probabilities, abs=1e-6)
    assert fleet.metric("trio_questions_total") == asked + 3
    with pytest.raises(openai.BadRequestError, match="label 'zebra'"):
        questions[1]["choices"][0]["value"] = "zebra"
        fleet.client.decisions.create(model="small", input="w1", questions=questions)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": "other"}, openai.NotFoundError, "model: expected one of small"),
        ({"max_tokens": LONG + 1}, openai.BadRequestError, "expected at most 900"),
        ({"messages": question("w1", "data:image/png;base64,AAAA")}, openai.BadRequestError, "image"),
        ({"messages": question("w1 " * 80)}, openai.BadRequestError, "64"),
    ],
    ids=["model", "length", "image", "prompt"],
)
def test_errors_are_those_of_a_server_without_replicas(
    fleet: Fleet, fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fleet.client.chat.completions.create(**{"model": "small", "messages": question("w1"), **fields})


@pytest.mark.usefixtures("two_long_answers")
def test_a_full_queue_says_when_to_come_back_and_vanished_clients_leave_it(fleet: Fleet) -> None:
    cancelled = fleet.metric("trio_cancelled_answers_total")
    waiting = [threading.Thread(target=partial(_give_up, fleet)) for _ in range(NUM_QUEUED)]
    for thread in waiting:
        thread.start()
        time.sleep(0.05)
    until(lambda: fleet.metric("trio_waiting_requests") == NUM_QUEUED)
    with pytest.raises(openai.RateLimitError, match="4 requests wait") as caught:
        fleet.ask("w1")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    until(lambda: fleet.metric("trio_waiting_requests") == 0)
    for thread in waiting:
        thread.join()
    assert fleet.metric("trio_cancelled_answers_total") == cancelled + NUM_QUEUED


def _give_up(fleet: Fleet) -> None:
    with contextlib.suppress(openai.APITimeoutError):
        fleet.ask("w1", timeout=1.0)


def test_a_dead_replica_ends_its_answer_with_an_error_and_is_replaced(
    fleet: Fleet, own: Pipeline, two_long_answers: list[Any]
) -> None:
    whole, streamed = ThreadPoolExecutor(1), two_long_answers[0]
    two_long_answers[1].close()
    until(lambda: fleet.metric("trio_running_requests") == 1)
    answer = whole.submit(fleet.ask, "w1 w2", extra_body={"ignore_eos": True})
    until(lambda: fleet.metric("trio_running_requests") == 2)
    old = fleet.replica_ids()
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="the replica ended before the answer's end"):
        list(streamed)
    with pytest.raises(openai.InternalServerError, match="the replica ended") as caught:
        answer.result(20)
    assert caught.value.status_code == 503
    expected = own.generate(None, "w3", max_new_tokens=6).text
    assert fleet.ask("w3", max_tokens=6) == expected  # waits for a new one
    until(lambda: len(fleet.replica_ids()) == 2, seconds=30)
    assert not set(old) & set(fleet.replica_ids())


def test_nobody_without_the_token_of_ray_can_speak_to_a_replica(fleet: Fleet) -> None:
    import grpc

    codes = set()
    for port in {port for pid in fleet.replica_ids() for port in listening(pid)}:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
            codes.add(caught.value.code())
    # Ray's own ports know no such method, and a replica that still loads answers nobody.
    others = {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE}
    assert codes - others == {grpc.StatusCode.UNAUTHENTICATED}


def listening(pid: int) -> set[int]:
    """Return the TCP ports on which a process listens."""
    sockets = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(path.readlink()))
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table.splitlines()]
    return {
        int(line[1].rpartition(":")[2], 16)
        for line in lines
        if line[3] == "0A" and f"socket:[{line[9]}]" in sockets
    }


def test_more_replicas_than_the_machine_has_cores_are_refused() -> None:
    check_room({"CPU": 4.0}, FleetSettings(min_replicas=2, max_replicas=2), threads=2, num_models=1)
    with pytest.raises(ShapeError, match="at most 4 CPUs in all, got 3 replicas with 2 each"):
        check_room({"CPU": 4.0}, FleetSettings(min_replicas=1, max_replicas=3), threads=2, num_models=1)
    with pytest.raises(ShapeError, match="at most 0 GPUs"):
        check_room({"CPU": 4.0}, FleetSettings(gpus=0.5), threads=1, num_models=1)


def test_the_replicas_of_all_models_share_the_cores_and_the_gpus() -> None:
    room = {"CPU": 4.0, "GPU": 1.0}
    check_room(room, FleetSettings(gpus=0.5), threads=2, num_models=2)
    with pytest.raises(ShapeError, match="at most 1 GPUs in all, got 2 replicas with 1 each"):
        check_room(room, FleetSettings(gpus=1.0), threads=1, num_models=2)
    with pytest.raises(ShapeError, match="at most 4 CPUs in all, got 3 replicas with 2 each"):
        check_room(room, FleetSettings(), threads=2, num_models=3)


def test_two_models_with_one_name_in_ray_are_one_line(reduced_bundle: Path) -> None:
    models = [f"a b={reduced_bundle}", f"a_b={reduced_bundle}"]
    options = ["--port", "0", "--replicas", "1", "--threads", "1"]
    result = subprocess.run(
        [str(COMMAND), *models, *options], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 2
    assert re.fullmatch(
        r"trio-serve: Ray: expected no application trio-serve-a_b, got one; .+\n", result.stderr
    ), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "expected a number, or two as 1-4, got '0'"),
        (["--replicas", "3-2"], "expected a number, or two as 1-4, got '3-2'"),
        (["--gpus", "1"], "expected --replicas with them"),
        (["--replicas", "2", "--max-queue", "0"], "expected at least 1 with --replicas"),
    ],
    ids=["none", "backwards", "alone", "queue"],
)
def test_wrong_options_are_one_line(
    reduced_bundle: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(reduced_bundle), *options]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_replicas_answer_at_the_level_of_a_request(levelled_bundle: Path) -> None:
    url, shown = image_url(PICTURE), [{"type": "input_image", "image_url": image_url(PICTURE)}]
    with (
        Pipeline.from_bundle(levelled_bundle, threads=1) as own,
        running_fleet(levelled_bundle, 1, "--busy-queue", "1") as fleet,
        ThreadPoolExecutor(3) as clients,
    ):
        listed: Any = list(fleet.client.models.list())
        assert listed[1].id == "small@auto"
        assert listed[1].trio["levels"] == ["quick", "full"]

        def ask(level: str, **fields: Any) -> Any:
            messages: Any = question(DOUBTFUL, url)
            return fleet.client.chat.completions.create(model=f"small@{level}", messages=messages, **fields)

        for level in ("auto", "base", "full"):
            expected, answer = own.generate(PICTURE, DOUBTFUL, level=level), ask(level)
            assert answer.choices[0].message.content == expected.text
            assert answer.usage.level == expected.statistics.level
            decision: Any = fleet.client.decisions.create(
                model="small",
                input=[{"role": "user", "content": shown}],  # type: ignore[list-item,misc]
                questions=[{"type": "predicate", "instructions": DOUBTFUL}],
                extra_body={"trio": {"level": level}},
            )
            (expected_decision,) = own.decide(PICTURE, Question.yes_no(DOUBTFUL), level=level)
            assert decision.answers[0].probability == expected_decision.probabilities[0]
        assert fleet.metric("trio_lowered_requests_total") == 0
        # The third request comes while the second waits for the first.
        answers = [clients.submit(ask, "full", n=16)]
        until(lambda: fleet.metric("trio_running_requests") == 1)
        answers.append(clients.submit(ask, "auto"))
        until(lambda: fleet.metric("trio_waiting_requests") == 1)
        answers.append(clients.submit(ask, "auto"))
        assert [answer.result().usage.level for answer in answers] == ["full", "full", "quick"]
        assert fleet.metric("trio_lowered_requests_total") == 1


@pytest.mark.filterwarnings("ignore")  # of Ray about pydantic
def test_a_serve_configuration_has_the_options_of_the_command(reduced_bundle: Path) -> None:
    import click

    from trio_edge.serving import ray_app

    named = {"bundles": f"small={reduced_bundle},all={reduced_bundle}"}
    given = ray_app._parsed(
        {**named, "clamp_max_tokens": True, "max_queue": 3, "busy_queue": 2, "api_key": "a"}
    )
    assert (given["clamp_max_tokens"], given["max_queue"], given["api_keys"]) == (True, 3, ("a",))
    assert given["busy_queue"] == 2
    assert given["bundles"] == tuple(named["bundles"].split(","))
    for options, message in (
        ({"host": "::"}, "host: expected none here"),
        ({"other": 1}, "No such option '?--other"),
        ({"max_queue": 0}, "expected at least 1 with --replicas, got 0"),
        ({"api_key": "a b"}, "--api-key: expected ASCII"),
    ):
        with pytest.raises(click.ClickException, match=message):
            ray_app.build({**named, **options})


def test_a_cluster_that_is_not_there_is_one_line(reduced_bundle: Path) -> None:
    options = ["--port", "0", "--replicas", "2", "--ray-address", "127.0.0.1:1"]
    result = subprocess.run(
        [str(COMMAND), str(reduced_bundle), *options], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert re.fullmatch(
        r"trio-serve: --ray-address: expected HOST:PORT of a cluster, got '127.0.0.1:1' .+\n", result.stderr
    ), result.stderr


def test_replicas_that_cannot_start_say_why(reduced_bundle: Path) -> None:
    options = ["--port", "0", "--replicas", "1", "--threads", "1", "--backend", "none-such"]
    result = subprocess.run(
        [str(COMMAND), str(reduced_bundle), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2
    assert re.match(
        r"trio-serve: model \w+.*: no replica could start: backend: expected .+ got 'none-such'",
        result.stderr,
    )
    assert "Traceback" not in result.stderr


@pytest.mark.filterwarnings("ignore")  # of Ray about pydantic
def test_a_status_that_fails_once_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayError

    from trio_edge.serving.fleet.worker import FleetWorker

    running = SimpleNamespace(replica_states={"RUNNING": 2})
    looks = iter([running, RayError("away"), KeyError("small"), running])

    def status(_worker: FleetWorker) -> Any:
        found = next(looks)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(FleetWorker, "_status", status)

    async def count() -> list[int]:
        worker = FleetWorker("small", Any, settings=ServerSettings(), metrics=Metrics())
        counts = []
        for _ in range(4):
            await worker._count_replicas()
            counts.append(worker._num_replicas)
        return counts

    assert asyncio.run(count()) == [2, 0, 0, 2]
