"""Chats that a server answers together are each one's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tests.bundles import export
from tests.pictures import random_picture
from tests.serving.server import image_url, question, running, slowed, until
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serving.server import RunningServer

PICTURES = [random_picture(40 + size, 48, seed=size) for size in range(4)]
URLS = [image_url(picture) for picture in PICTURES]
LEVELS = ("usual", "full", "auto")


@pytest.fixture(scope="module")
def bundle(levelled_bundle: Path) -> Path:
    """The packaged model with a level that reduces and one with all tokens, for four answers together."""
    from trio_edge.export.options import LevelRequest
    from trio_edge.runtime.bundle.reader import open_bundle
    from trio_edge.runtime.bundle.schedule import Schedule

    usual = open_bundle(levelled_bundle).manifest.schedule
    levels = LevelRequest("usual", usual), LevelRequest("full", Schedule())
    options: dict[str, Any] = {"dtype": "float32", "follow_ups": True, "max_new_tokens": 16}
    return export("tiny", levels=levels, batch=4, **options)


@pytest.fixture(scope="module")
def own(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def slow(bundle: Path) -> Iterator[RunningServer]:
    """Each piece takes 20 ms more, so that requests meet."""
    with running({"tiny": lambda: slowed(Pipeline.from_bundle(bundle), 0.02)}) as server:
        yield server


@pytest.mark.parametrize("num_clients", [2, 4, 16])
def test_every_client_gets_its_own_answers(bundle: Path, own: Pipeline, num_clients: int) -> None:
    """At all levels, streamed and whole, with seeds of their own."""
    texts = ["what color is the digit 3 ?", "where is the digit 3 ?", "how many shapes are there ?"]
    cases = [(seed % 4, texts[seed % 3], LEVELS[seed // 5 % 3], seed) for seed in range(48)]
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 8, "min_new_tokens": 6}
    expected = [
        own.generate(PICTURES[picture], text, level=level, seed=seed, **settings).text
        for picture, text, level, seed in cases
    ]
    with running({"tiny": partial(Pipeline.from_bundle, bundle)}) as server:
        client = server.client()
        create: Any = client.chat.completions.create

        def ask(case: tuple[int, str, str, int]) -> str:
            picture, text, level, seed = case
            fields: dict[str, Any] = {
                "model": f"tiny@{level}",
                "messages": question(text, URLS[picture]),
                "temperature": 1.0,
                "max_tokens": 8,
                "seed": seed,
                "extra_body": {"min_tokens": 6},
            }
            if seed % 2:
                return str(create(**fields).choices[0].message.content)
            chunks = create(stream=True, **fields)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(num_clients) as clients:
            answers = list(clients.map(ask, cases))
    assert answers == expected
    assert len(set(expected)) > 12


def together(server: RunningServer, asked: list[dict[str, Any]]) -> tuple[list[tuple[int, Any]], int]:
    """Ask all at once; return the answers, and the most that ran at the same time."""
    worker, most = server.workers["tiny"], 0
    with ThreadPoolExecutor(len(asked)) as clients:
        answers = [clients.submit(server.ask, **fields) for fields in asked]

        def have_ended() -> bool:
            nonlocal most
            most = max(most, len(worker._running))
            return all(answer.done() for answer in answers)

        until(have_ended, seconds=60)
    return [answer.result() for answer in answers], most


def asking(number: int, level: str = "usual", **fields: Any) -> dict[str, Any]:
    return {
        "model": f"tiny@{level}",
        "messages": question("where is the digit 3 ?", URLS[number % 4]),
        "min_tokens": 8,
        "max_tokens": 8,
        **fields,
    }


def test_chats_at_one_level_run_at_once(slow: RunningServer) -> None:
    answers, most = together(slow, [asking(number) for number in range(6)])
    assert [status for status, _ in answers] == [200] * 6
    assert 2 <= most <= 4


@pytest.mark.parametrize("others", [["full"] * 3, ["auto"] * 3], ids=["another level", "auto"])
def test_what_cannot_join_waits_for_its_turn(slow: RunningServer, own: Pipeline, others: list[str]) -> None:
    asked = [asking(number, level) for number, level in enumerate(["usual", *others, "usual"])]
    answers, most = together(slow, asked)
    assert [status for status, _ in answers] == [200] * len(asked)
    assert most <= (3 if "full" in others else 2)
    for fields, (_, answer) in zip(asked, answers, strict=True):
        picture = PICTURES[asked.index(fields) % 4]
        wanted = own.generate(
            picture,
            "where is the digit 3 ?",
            level=fields["model"].partition("@")[2],
            max_new_tokens=8,
            min_new_tokens=8,
        )
        assert answer["choices"][0]["message"]["content"] == wanted.text


def test_a_client_that_leaves_does_not_disturb_the_others(slow: RunningServer, own: Pipeline) -> None:
    wanted = own.generate(
        PICTURES[0], "where is the digit 3 ?", level="usual", max_new_tokens=8, min_new_tokens=8
    )
    create: Any = slow.client().chat.completions.create
    with ThreadPoolExecutor(1) as clients:
        for _ in range(4):
            answer = clients.submit(slow.ask, **asking(0))
            asked = asking(1)
            stream = create(extra_body={"min_tokens": asked.pop("min_tokens")}, stream=True, **asked)
            next(iter(stream))
            stream.close()
            assert answer.result()[1]["choices"][0]["message"]["content"] == wanted.text
    until(lambda: slow.workers["tiny"]._running == {})


def test_an_answer_of_a_given_form_beside_others(slow: RunningServer) -> None:
    """Its certain tokens run one by one in the batch; the others' tokens come all the same."""
    alone = slow.ask(**asking(1, structured_outputs={"choice": ["no yes no", "center yes"]}, min_tokens=0))[1]
    asked = [
        asking(0),
        asking(1, structured_outputs={"choice": ["no yes no", "center yes"]}, min_tokens=0),
        asking(2),
    ]
    answers, most = together(slow, asked)
    assert [status for status, _ in answers] == [200] * 3, answers
    assert most > 1
    assert answers[1][1]["choices"] == alone["choices"]


def test_a_full_queue_counts_those_that_wait(bundle: Path) -> None:
    """Four run at once and two wait; the seventh is refused."""
    load = lambda: slowed(Pipeline.from_bundle(bundle), 0.1)  # noqa: E731
    with running({"tiny": load}, ServerSettings(max_queue=2)) as server:
        worker = server.workers["tiny"]
        with ThreadPoolExecutor(6) as clients:
            answers = []
            for number in range(6):
                answers.append(clients.submit(server.ask, **asking(number)))
                sizes = min(number + 1, 4), max(number - 3, 0)
                until(lambda sizes=sizes: (len(worker._running), len(worker._waiting)) == sizes)  # type: ignore[misc]
            assert server.ask(**asking(0))[0] == 429
            assert [answer.result()[0] for answer in answers] == [200] * 6
