"""A bundle with several levels: each interface answers at the level that a request names, as the pipeline does at this level."""

from __future__ import annotations

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.server import image_url, question, running, until
from tests.serving.test_decisions import PICTURE
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving import cli
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serving.server import RunningServer

SURE, DOUBTFUL = "where is the diamond ?", "is there a star ?"
LEVELS = (None, "base", "quick", "usual", "full", "auto")
NAMES = ["tiny", *(f"tiny@{level}" for level in ("auto", "base", "quick", "usual", "full"))]
URL = image_url(PICTURE)
QUESTIONS = [
    Question.yes_no(DOUBTFUL),
    Question.choice("what color is the digit 3 ?", ["red", "green", "blue"]),
]
PREDICATE: dict[str, Any] = {"type": "predicate", "instructions": DOUBTFUL}
CHOICE: dict[str, Any] = {
    "type": "choice",
    "instructions": "what color is the digit 3 ?",
    "choices": [{"value": "red"}, {"value": "green"}, {"value": "blue"}],
}


@pytest.fixture(scope="module")
def own(levelled_bundle: Path) -> Iterator[Pipeline]:
    """The bundle without a server."""
    with Pipeline.from_bundle(levelled_bundle) as pipeline:
        yield pipeline


def named(level: str | None, *, in_name: bool, **options: Any) -> dict[str, Any]:
    """Return the fields that name a level: our own, or the model's name."""
    if in_name:
        return {"model": "tiny" if level is None else f"tiny@{level}", "trio": options}
    return {"model": "tiny", "trio": options if level is None else {"level": level, **options}}


def asked(given: dict[str, Any]) -> dict[str, Any]:
    return {"model": given["model"], "extra_body": {"trio": given["trio"]}}


def assert_counted(usage: Any, statistics: Any) -> None:
    assert usage.level == statistics.level
    assert tuple(getattr(usage, "levels_below", ())) == statistics.levels_below
    assert usage.visual_tokens == statistics.visual_tokens
    assert tuple(usage.kept_tokens) == statistics.kept_tokens


in_both_places = pytest.mark.parametrize("in_name", [False, True], ids=["field", "name"])
at_each_level = pytest.mark.parametrize("level", LEVELS)
whole_or_streamed = pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
of_each_kind = pytest.mark.parametrize("text", [SURE, DOUBTFUL], ids=["sure", "doubtful"])


@of_each_kind
@at_each_level
@in_both_places
@whole_or_streamed
def test_a_chat_is_the_levels_own(
    levelled: RunningServer, own: Pipeline, text: str, level: str | None, in_name: bool, is_streamed: bool
) -> None:
    expected = own.generate(PICTURE, text, level=level)
    fields: dict[str, Any] = {**asked(named(level, in_name=in_name)), "messages": question(text, URL)}
    create = levelled.client().chat.completions.create
    if is_streamed:
        chunks = list(create(stream=True, stream_options={"include_usage": True}, **fields))
        said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        model, usage = chunks[0].model, chunks[-1].usage
    else:
        answer = create(**fields)
        said, model, usage = answer.choices[0].message.content, answer.model, answer.usage
    assert (said, model) == (expected.text, "tiny")
    assert_counted(usage, expected.statistics)


@of_each_kind
@at_each_level
@in_both_places
@whole_or_streamed
def test_a_response_is_the_levels_own(
    levelled: RunningServer, own: Pipeline, text: str, level: str | None, in_name: bool, is_streamed: bool
) -> None:
    expected = own.generate(PICTURE, text, level=level)
    parts = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": text}]
    fields: dict[str, Any] = {"input": [{"role": "user", "content": parts}], "stream": is_streamed}
    found = levelled.client().responses.create(**asked(named(level, in_name=in_name)), **fields)
    response = list(found)[-1].response if is_streamed else found
    assert response.output_text == expected.text
    assert_counted(response.usage, expected.statistics)


def test_the_two_questions_settle_at_different_levels(own: Pipeline) -> None:
    """Else the tests of "auto" would say nothing."""
    found = []
    for text in (SURE, DOUBTFUL):
        answer = own.generate(PICTURE, text, level="auto")
        assert answer.text
        found.append((answer.statistics.level, answer.statistics.levels_below))
    assert found == [("quick", ()), ("full", ("quick",))]
    levels = [decision.statistics.level for decision in own.decide(PICTURE, QUESTIONS, level="auto")]
    assert levels == ["full", "quick"]


@at_each_level
@in_both_places
def test_a_decision_is_the_levels_own(
    levelled: RunningServer, own: Pipeline, level: str | None, in_name: bool
) -> None:
    expected = own.decide(PICTURE, QUESTIONS, level=level)
    content: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]
    decision = levelled.client().decisions.create(
        input=content,
        questions=[PREDICATE, CHOICE],
        **asked(named(level, in_name=in_name)),
    )
    predicate, choice = decision.answers
    assert predicate.probability == expected[0].probabilities[0]
    assert [one.probability for one in choice.probabilities] == list(expected[1].probabilities)
    for answer, one in zip(decision.answers, expected):
        diagnostics: Any = answer.diagnostics
        assert diagnostics["level"] == one.statistics.level
        assert tuple(diagnostics.get("levels_below", ())) == one.statistics.levels_below
        assert tuple(diagnostics["kept_tokens"]) == one.statistics.kept_tokens
    assert_counted(decision.usage, expected[0].statistics)
    levels = [one.statistics.level for one in expected]
    assert decision.usage.levels == {name: levels.count(name) for name in levels}


@at_each_level
@in_both_places
def test_system_one_answers_at_the_level(
    levelled: RunningServer, own: Pipeline, level: str | None, in_name: bool
) -> None:
    asset = {"format": "png", "data_base64": URL.partition(",")[2]}
    questions = {
        "star": {"type": "noul", "instructions": DOUBTFUL},
        "color": {
            "type": "choice",
            "instructions": CHOICE["instructions"],
            "criteria": dict.fromkeys(("red", "green", "blue")),
        },
    }
    body = {"state": "photo", "assets": {"photo": asset}, "questions": questions}
    given = json.dumps({**body, **named(level, in_name=in_name)}).encode()
    status, found = levelled.post(given, path="/v1/systemone")
    assert status == 200, found
    star, color = own.decide(PICTURE, QUESTIONS, level=level)
    assert found["answers"]["star"]["noul"] == star.probabilities[0]
    assert list(found["answers"]["color"]["probabilities"].values()) == list(color.probabilities)
    assert [found["diagnostics"][name]["level"] for name in questions] == [
        star.statistics.level,
        color.statistics.level,
    ]


def test_the_kept_tokens_are_those_of_the_level(levelled: RunningServer) -> None:
    layers = {}
    for level in LEVELS[1:-1]:
        fields = asked(named(level, in_name=True, kept=True))
        answer: Any = levelled.client().chat.completions.create(messages=question(SURE, URL), **fields)
        stages = answer.trio["images"][0]["stages"]
        layers[level] = [(stage["layer"], stage["kept"]) for stage in stages]
    assert layers == {
        "base": [(0, 37), (1, 20), (5, 12), (8, 4)],
        "quick": [(0, 192), (1, 6), (5, 2), (8, 1)],
        "usual": [(0, 192), (1, 20), (5, 12), (8, 4)],
        "full": [(0, 192)],
    }


@pytest.mark.parametrize(
    ("given", "status", "problem"),
    [
        (
            {"model": "tiny", "trio": {"level": "best"}},
            400,
            "trio.level: expected auto or base or quick or usual or full (the model's levels), got 'best'; choose one",
        ),
        (
            {"model": "tiny@quick", "trio": {"level": "full"}},
            400,
            "trio.level: expected quick (the one in the model's name), got 'full'; leave one out",
        ),
        (
            {"model": "tiny@auto", "trio": {"level": "quick"}},
            400,
            "trio.level: expected auto (the one in the model's name), got 'quick'; leave one out",
        ),
        ({"model": "tiny@best"}, 404, f"model: expected one of {', '.join(NAMES)}, got 'tiny@best'"),
        ({"model": "tiny@"}, 404, f"model: expected one of {', '.join(NAMES)}, got 'tiny@'"),
    ],
    ids=["unknown", "two", "auto and one", "unknown in the name", "empty"],
)
def test_a_wrong_level_is_refused_by_name_in_each_form(
    levelled: RunningServer, given: dict[str, Any], status: int, problem: str
) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": question(SURE)},
        "/v1/responses": {"input": SURE},
        "/v1/decisions": {"input": SURE, "questions": [PREDICATE]},
        "/v1/systemone": {"state": SURE, "questions": {"star": {"type": "noul"}}},
    }
    for path, body in bodies.items():
        found, told = levelled.post(json.dumps({**body, **given}).encode(), path=path)
        if path != "/v1/systemone":
            param = "trio.level" if status == 400 else "model"
            assert (found, told["error"]["message"], told["error"]["param"]) == (status, problem, param)
        elif status == 400:
            assert (found, told["detail"][0]["loc"]) == (422, ["body", "trio", "level"])
            assert told["detail"][0]["msg"] == problem.partition(": ")[2]
        else:
            assert (found, told["detail"]) == (404, problem)


def test_the_same_level_may_be_given_twice(levelled: RunningServer) -> None:
    status, found = levelled.ask(model="tiny@quick", messages=question(SURE), trio={"level": "quick"})
    assert (status, found["usage"]["level"]) == (200, "quick")


def test_with_one_level_nothing_changes(server: RunningServer) -> None:
    _, expected = server.ask()
    for level in ("auto", "default"):
        status, found = server.ask(trio={"level": level})
        assert status == 200
        assert found["choices"] == expected["choices"]
        assert found["usage"].keys() == expected["usage"].keys()
    assert "level" not in expected["usage"]
    status, found = server.ask(trio={"level": "quick"})
    assert (status, found["error"]["param"]) == (400, "trio.level")
    assert "expected auto or default (the model's levels), got 'quick'" in found["error"]["message"]
    assert server.ask(model="reduced@default")[0] == 404


def test_each_level_is_listed_with_its_facts(levelled: RunningServer, own: Pipeline) -> None:
    models: Any = levelled.client().models
    listed = {model.id: model.trio for model in models.list()}
    assert list(listed) == NAMES
    assert listed["tiny"] == listed["tiny@usual"]
    for level in own.manifest.level_names:
        facts, manifest = listed[f"tiny@{level}"], own.manifest.at_level(level)
        assert facts["visual_tokens"] == manifest.visual_sizes[-1]
        assert facts["stages"] == [
            {"layer": stage.layer, "keep": stage.keep} for stage in manifest.schedule.stages
        ]
        assert (facts["level"], facts["levels"]) == (level, ["base", "quick", "usual", "full"])
        assert facts["flops"] == sum(manifest.cost.reduced_flops.values())
    assert listed["tiny@full"]["average_keep"] == 1.0
    auto = models.retrieve("tiny@auto").trio
    assert (auto["level"], auto["levels"], auto["average_keep"]) == ("auto", ["quick", "full"], None)
    assert auto["max_new_tokens"] == 16
    with urllib.request.urlopen(f"{levelled.url}/v1/models") as answer:
        assert [model["name"] for model in json.load(answer)["models"]] == NAMES


@pytest.mark.parametrize(
    ("level", "detail", "expected"),
    [(None, "low", "base"), (None, "high", "full"), (None, "auto", "usual"), ("usual", "low", "usual")],
)
def test_detail_chooses_a_level_unless_one_is_named(
    levelled: RunningServer, level: str | None, detail: str, expected: str
) -> None:
    fields = named(level, in_name=False)
    status, found = levelled.ask(messages=question(SURE, URL, detail=detail), **fields)
    assert (status, found["usage"]["level"]) == (200, expected)


def counts_of(server: RunningServer, name: str, label: str) -> dict[str, float]:
    """Return the counts of a metric by label."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels[label]: sample.value for sample in samples}


def gated(bundle: Path, gate: threading.Event) -> Pipeline:
    """Return a pipeline that begins each answer when the gate opens."""
    pipeline = Pipeline.from_bundle(bundle)
    chat = pipeline.chat

    def waiting(*args: Any, **settings: Any) -> Any:
        assert gate.wait(30)
        return chat(*args, **settings)

    pipeline.chat = waiting
    return pipeline


@pytest.mark.parametrize(
    ("busy_queue", "expected", "lowered"),
    [(None, ["full"] * 3, 0), (1, ["full", "quick", "full"], 1), (2, ["full"] * 3, 0)],
)
def test_a_queue_that_grows_lowers_auto(
    levelled_bundle: Path, busy_queue: int | None, expected: list[str], lowered: int
) -> None:
    gate = threading.Event()
    settings = ServerSettings(busy_queue=busy_queue)
    with (
        running({"tiny": partial(gated, levelled_bundle, gate)}, settings) as server,
        ThreadPoolExecutor(3) as clients,
    ):
        worker = server.workers["tiny"]
        fields: dict[str, Any] = {"model": "tiny@auto", "messages": question(DOUBTFUL, URL)}
        answers = []
        for number in range(3):
            answers.append(clients.submit(server.ask, **fields))
            until(lambda number=number: worker._running != {} and len(worker._waiting) == number)
        gate.set()
        assert [answer.result()[1]["usage"]["level"] for answer in answers] == expected
        until(lambda: worker._running == {})
        assert counts_of(server, "trio_lowered_requests_total", "model") == (
            {"tiny": lowered} if lowered else {}
        )
        counts = {level: float(expected.count(level)) for level in expected}
        assert counts_of(server, "trio_level_answers_total", "level") == counts


def test_a_level_that_is_named_is_never_lowered(levelled_bundle: Path) -> None:
    gate = threading.Event()
    with (
        running({"tiny": partial(gated, levelled_bundle, gate)}, ServerSettings(busy_queue=1)) as server,
        ThreadPoolExecutor(3) as clients,
    ):
        worker = server.workers["tiny"]
        asking = partial(server.ask, messages=question(DOUBTFUL, URL))
        answers = [clients.submit(asking, model="tiny@full")]
        until(lambda: worker._running != {})
        answers += [clients.submit(asking, model=model) for model in ("tiny@full", "tiny")]
        until(lambda: len(worker._waiting) == 2)
        gate.set()
        assert sorted(answer.result()[1]["usage"]["level"] for answer in answers) == ["full", "full", "usual"]


def test_metrics_count_questions_by_level(levelled_bundle: Path) -> None:
    with running({"tiny": partial(Pipeline.from_bundle, levelled_bundle)}) as server:
        content: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]
        create = server.client().decisions.create
        create(model="tiny@auto", input=content, questions=[PREDICATE, CHOICE, CHOICE])
        assert server.ask(model="tiny@base", messages=question(SURE))[0] == 200
        until(lambda: server.workers["tiny"]._running == {})
        found = counts_of(server, "trio_level_answers_total", "level")
        assert found == {"full": 1.0, "quick": 2.0, "base": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--busy-queue", "16"], "--busy-queue: expected less than --max-queue (16), got 16; choose less"),
        (["--busy-queue", "0"], "--busy-queue: expected a number of at least 1, got 0"),
    ],
)
def test_a_number_that_can_never_wait_is_refused(
    levelled_bundle: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([str(levelled_bundle), *options]) == 2
    assert message in capfd.readouterr().err


def test_an_unknown_model_is_still_loading_until_its_levels_are_known(levelled_bundle: Path) -> None:
    """ "tiny@quick" is no wrong name while nobody knows the levels."""
    from starlette.testclient import TestClient

    from trio_edge.serving.app import make_app

    gate = threading.Event()

    def load() -> Pipeline:
        assert gate.wait(30)
        return Pipeline.from_bundle(levelled_bundle)

    with TestClient(make_app({"tiny": load}), base_url="http://localhost") as client:
        body = {"model": "tiny@quick", "messages": question(SURE)}
        told = client.post("/v1/chat/completions", json=body)
        gate.set()
        assert (told.status_code, told.json()["error"]["code"]) == (503, "loading")
        assert client.post("/v1/chat/completions", json={**body, "model": "other@quick"}).status_code == 404
