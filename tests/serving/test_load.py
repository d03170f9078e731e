"""Many clients at a time: no answer is lost or given to another, and the queue has an end."""

from __future__ import annotations

import gc
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.pictures import random_picture
from tests.serving.server import image_url, question, running, slowed, until
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.job import AnswerJob
from trio_edge.serving.requests.content import Prompt
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from pathlib import Path

NUM_CLIENTS = 16
NUM_REQUESTS = 112


def test_every_one_of_sixteen_clients_gets_its_own_answers(reduced_bundle: Path, pipeline: Pipeline) -> None:
    images = [random_picture(40 + size, 48, seed=size) for size in range(8)]
    cases = [(seed % 8, f"w{seed % 7} w{seed % 5 + 8}", seed) for seed in range(NUM_REQUESTS)]
    settings = {"temperature": 1.0, "max_new_tokens": 6}
    own = [pipeline.generate(images[image], text, seed=seed, **settings).text for image, text, seed in cases]
    urls = [image_url(image) for image in images]
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}) as server:
        client = server.client()

        def ask(case: tuple[int, str, int]) -> str:
            image, text, seed = case
            fields: dict[str, Any] = {"temperature": 1.0, "max_tokens": 6, "seed": seed}
            messages: Any = question(text, urls[image])
            if seed % 2:
                answer = client.chat.completions.create(model="reduced", messages=messages, **fields)
                return answer.choices[0].message.content or ""
            chunks: Any = client.chat.completions.create(
                model="reduced", messages=messages, stream=True, **fields
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(NUM_CLIENTS) as clients:
            answers = list(clients.map(ask, cases))
        client.close()
    assert answers == own
    assert len(set(own)) > NUM_REQUESTS // 2


def test_a_full_queue_says_when_to_come_back(reduced_bundle: Path) -> None:
    def load() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.05)

    with running({"reduced": load}, ServerSettings(max_queue=2)) as server:
        fields: Any = {"model": "reduced", "messages": question("w1"), "max_tokens": 10}
        fields["extra_body"] = {"ignore_eos": True}
        create = server.client().chat.completions.create
        create(**fields)  # its time is measured: half a second
        worker = server.workers["reduced"]
        until(lambda: worker._running == {})  # the client has its answer before the worker has counted it
        with ThreadPoolExecutor(3) as clients:
            # A third request that arrives before the first runs would be refused; the first runs while the others come.
            answers = [clients.submit(create, **{**fields, "max_tokens": 40})]
            until(lambda: worker._running != {})
            answers += [clients.submit(create, **fields) for _ in range(2)]
            until(lambda: worker._running != {} and len(worker._waiting) == 2)
            with pytest.raises(openai.RateLimitError, match="2 requests wait") as raised:
                create(**fields)
            assert 1 <= int(raised.value.response.headers["retry-after"]) <= 2
            assert raised.value.code == "queue_full"
            patient = server.client(max_retries=8)  # the client's own way to wait
            assert patient.chat.completions.create(**fields).usage is not None
            assert all(answer.result().usage for answer in answers)
            patient.close()


def test_a_wait_that_is_too_long_is_refused_though_the_queue_has_room(reduced_bundle: Path) -> None:
    def load() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.05)

    with running({"reduced": load}, ServerSettings(max_queue=100, max_wait_s=0.2)) as server:
        create = partial(
            server.client().chat.completions.create,
            model="reduced",
            messages=question("w1"),
            max_tokens=40,
            extra_body={"ignore_eos": True},
        )
        create()
        worker = server.workers["reduced"]
        until(lambda: worker._running == {})  # as above
        with ThreadPoolExecutor(1) as clients:
            answer = clients.submit(create)
            until(lambda: worker._running != {})
            with pytest.raises(openai.RateLimitError, match="0 requests wait, about"):
                create()
            assert answer.result().usage is not None


def test_a_request_leaves_nothing_in_memory(reduced_bundle: Path) -> None:
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}) as server:
        messages: Any = question("w1", image_url())
        assert server.ask(messages=messages)[0] == 200
        create = server.client().chat.completions.create
        assert list(create(model="reduced", messages=messages, stream=True))
        until(lambda: server.workers["reduced"]._running == {})
        gc.collect()
        assert [thing for thing in gc.get_objects() if isinstance(thing, (AnswerJob, Prompt))] == []


def settled_metrics(url: str) -> dict[tuple[str, str | None, str | None], float]:
    """Return the samples once no answer runs: the worker counts its last one down after the client has it."""
    for _ in range(100):
        with urllib.request.urlopen(url) as answer:
            text = answer.read().decode()
        found = {
            (
                sample.name,
                sample.labels.get("model"),
                sample.labels.get("status") or sample.labels.get("stage"),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        if found["trio_running_requests", "reduced", None] == 0:
            break
        time.sleep(0.05)
    return found


def test_metrics_count_what_was_asked(reduced_bundle: Path) -> None:
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}) as server:
        fields: Any = {"messages": question("w1", image_url()), "max_tokens": 3}
        for _ in range(2):
            server.ask(**fields, ignore_eos=True)
        server.ask(n=99)
        server.ask(model="other")
        found = settled_metrics(f"{server.url}/metrics")
    assert found["trio_requests_total", "reduced", "200"] == 2
    assert found["trio_requests_total", "", "400"] == 1
    assert found["trio_requests_total", "", "404"] == 1
    assert found["trio_completion_tokens_total", "reduced", None] == 6
    assert found["trio_visual_tokens_total", "reduced", None] == 2 * 51
    assert found["trio_kept_tokens_total", "reduced", "2"] == 2 * 6
    assert found["trio_first_token_seconds_count", "reduced", None] == 2
    assert found["trio_running_requests", "reduced", None] == 0
