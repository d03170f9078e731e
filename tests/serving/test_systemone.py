"""``/v1/systemone``: TypeSafe's own client gets the pipeline's own probabilities, images included."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as PilImage
from typesafe_sdk import (
    Box,
    Choice,
    Image,
    Noul,
    RetryPolicy,
    Score,
    TypeSafeAPIError,
    TypeSafeAuthenticationError,
    TypeSafeClient,
    TypeSafeNotFoundError,
    TypeSafeUnprocessableEntityError,
)

from tests.bundles import export
from tests.pictures import random_picture
from tests.serving.server import running
from tests.serving.test_decisions import OWN, PICTURE, places, with_value
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.requests.body import form_parts
from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.systemone import parse_system_one
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.serving.server import RunningServer

PATH = "/v1/systemone"
QUESTIONS: dict[str, Any] = {
    "star": Noul(instructions="is there a star ?"),
    "color": Choice(
        instructions="what color is the digit 3 ?", criteria={"red": None, "green": None, "blue": None}
    ),
    "count": Score(instructions="how many circles are there ?", criteria=["zero", "one", "two"]),
}


def png(picture: PilImage.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def client_of(server: RunningServer, **settings: Any) -> TypeSafeClient:
    given = {"api_key": "none", "model": "reduced", "retry": RetryPolicy(max_retries=0), **settings}
    return server.clients.enter_context(TypeSafeClient(base_url=server.url, compression=False, **given))


@pytest.fixture(scope="module")
def client(decider: RunningServer) -> Iterator[TypeSafeClient]:
    return client_of(decider)


def test_answers_are_the_pipelines_own_by_name(client: TypeSafeClient, tiny: Pipeline) -> None:
    response = client.system_one(Image(png(PICTURE)), QUESTIONS)
    star, color, count = tiny.decide(PICTURE, OWN)
    assert response.model == "reduced"
    assert list(response.answers) == ["star", "color", "count"]
    assert response.nouls["star"].noul == pytest.approx(star.probabilities[0], abs=1e-6)
    assert response.choices["color"].probabilities == pytest.approx(color.by_name(), abs=1e-6)
    assert (response.choices["color"].choice, color.choice) == ("green", "green")
    assert response.choices["color"].confidence == pytest.approx(color.confidence, abs=1e-6)
    found = response.scores["count"]
    assert found.score == pytest.approx(count.score, abs=1e-6)
    assert found.legend == {0: "zero", 1: "one", 2: "two"}
    assert found.probabilities == pytest.approx(dict(enumerate(count.probabilities)), abs=1e-6)
    assert response.usage.input_tokens is not None
    assert response.usage.input_tokens > 3 * 192
    assert response.usage.output_tokens == 3
    raw = json.loads(response.raw_http_response.content)
    assert raw["diagnostics"]["star"]["label_mass"] == pytest.approx(star.label_mass, abs=1e-6)
    assert raw["diagnostics"]["star"]["kept_tokens"] == list(star.statistics.kept_tokens)


def test_text_and_dictionaries_are_asked_likewise(client: TypeSafeClient, tiny: Pipeline) -> None:
    asked: dict[str, Any] = {"star": {"type": "noul", "instructions": "is there a star ?"}}
    found = client.system_one("there is a red star .", asked).nouls["star"].noul
    own = tiny.decide(None, OWN[0], evidence="there is a red star .")[0]
    assert found == pytest.approx(own.probabilities[0], abs=1e-6)


def test_an_image_in_base64_is_the_same(client: TypeSafeClient) -> None:
    data = base64.b64encode(png(PICTURE)).decode()
    assets: Any = {"photo": {"type": "image", "format": "png", "data_base64": data}}
    inline = client.system_one("photo", QUESTIONS, extra_body={"assets": assets})
    assert (
        inline.answers == client.system_one("photo", QUESTIONS, assets={"photo": Image(png(PICTURE))}).answers
    )


def test_images_anywhere_are_numbered_in_the_text() -> None:
    data = base64.b64encode(b"a").decode()
    image = {"type": "image", "format": "png", "data_base64": data}
    asked = {
        "model": "m",
        "state": {"front": 'photo "1"', "back": ["x", "see photo-2"], "again": 'photo "1"'},
        "questions": {
            "one": {
                "type": "noul",
                "instructions": 'like <own> or photo "1"?',
                "criteria": {"false": ["<own>"]},
            },
            "two": {"type": "choice", "criteria": {"a": {"like": "last"}, "b": None}},
            "three": {"type": "score", "instructions": ["?"], "criteria": ["low", {"high": 1}]},
            "four": {"type": "noul", "instructions": "an image ?"},
        },
        "assets": dict.fromkeys(('photo "1"', "photo-2", "<own>", "last", "image"), image),
    }
    named, (chat, asking, _) = parse_system_one(json.dumps(asked).encode(), max_parts=20)
    assert list(named) == ["one", "two", "three", "four"]
    state = '{"front":"[image 1]","back":["x","see [image 2]"],"again":"[image 1]"}'
    assert [getattr(part, "text", "image") for part in chat.messages[0].parts] == ["image", "image", state]
    one, two, three, four = asking.questions
    assert one == Question.yes_no("like [image 3] or [image 1]?", no='["[image 3]"]')
    assert two == Question.choice("Which of these is it?", {"a": '{"like":"[image 3]"}', "b": ""})
    assert three == Question.score('["?"]', ["low", '{"high":1}'])
    assert four.text == "an [image 3] ?"  # the number's own text names no image
    assert [len(turn.parts) - 1 for turn in chat.messages[1:]] == [1, 1, 0, 1]


def test_images_of_a_question_come_after_the_states(checkpoint: Path) -> None:
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)), budget="image")
    bundle = export(checkpoint, schedule=schedule, max_images=3, follow_ups=True)
    shared, mine = random_picture(48, 48), random_picture(40, 56, seed=3)
    with running({"reduced": partial(Pipeline.from_bundle, bundle)}) as server:
        choice = Choice(instructions={"look": Image(png(mine))}, criteria={"w5": None, "w6": None})
        found = client_of(server).system_one(Image(png(shared)), {"like": choice})
    with Pipeline.from_bundle(bundle) as pipeline:
        (own,) = pipeline.decide([shared, mine], Question.choice('{"look":"[image 2]"}', ["w5", "w6"]))
    assert found.choices["like"].probabilities == pytest.approx(own.by_name(), abs=1e-6)


def test_models_are_listed_as_both_clients_read_them(client: TypeSafeClient, decider: RunningServer) -> None:
    assert [model.name for model in client.models.list().models] == ["reduced", "full"]
    assert [model.id for model in decider.client().models.list()] == ["reduced", "full"]
    assert client.system_one("a star", QUESTIONS, model="full").model == "full"


ERRORS: dict[str, tuple[dict[str, Any], type[TypeSafeAPIError], str]] = {
    "model": ({"model": "other"}, TypeSafeNotFoundError, "model: expected one of"),
    "box": (
        {"questions": {"dog": Box(instructions="the dog")}},
        TypeSafeUnprocessableEntityError,
        r" questions\.dog\.type: Invalid value 'box'",
    ),
    "one_option": (
        {"questions": {"a": Choice(criteria={"red": None})}},
        TypeSafeUnprocessableEntityError,
        r" questions\.a: question .* expected 2\.\.255 options",
    ),
    "levels": (
        {"questions": {"a": Score(criteria=["red"] * 2)}},
        TypeSafeUnprocessableEntityError,
        "got 'red' twice",
    ),
    "word": (
        {"questions": {"a": Choice(criteria={"red": None, "maroon": None})}},
        TypeSafeAPIError,
        "400 label 'maroon'",
    ),
    "unused": (
        {"assets": {"photo": Image(b"abc")}},
        TypeSafeUnprocessableEntityError,
        r" assets\.photo: expected its name in the state",
    ),
    "no_image": (
        {"state": Image(b"abc")},
        TypeSafeUnprocessableEntityError,
        r" assets\.<image:\w+>: expected an image",
    ),
    "field": (
        {"extra_body": {"instructions": "x"}},
        TypeSafeUnprocessableEntityError,
        " instructions: not a field",
    ),
    "part": (
        {"state": "photo", "extra_body": {"assets": {"photo": {"part": "asset-0"}}}},
        TypeSafeUnprocessableEntityError,
        r" assets\.photo: expected a part 'asset-0'",
    ),
    "no_data": (
        {"state": "photo", "extra_body": {"assets": {"photo": {"data_base64": "AAAA"}}}},
        TypeSafeUnprocessableEntityError,
        r" assets\.photo: expected a part, or data_base64 and format",
    ),
    "long": ({"state": "star " * 80}, TypeSafeUnprocessableEntityError, " prompt: expected at most"),
    "two_images": (
        {"state": [Image(png(PICTURE)), Image(png(PICTURE))]},
        TypeSafeUnprocessableEntityError,
        "expected at most 1",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_the_clients_exception_and_names_the_field(client: TypeSafeClient, case: str) -> None:
    fields, kind, expected = ERRORS[case]
    asked = {"state": "a star", "questions": {"star": QUESTIONS["star"]}, **fields}
    with pytest.raises(kind, match=expected) as raised:
        client.system_one(**asked)
    assert set(raised.value.body) == {"detail"}


def test_a_key_is_needed_where_one_is_set(deciding_bundles: dict[str, Path]) -> None:
    models = {"reduced": partial(Pipeline.from_bundle, deciding_bundles["reduced"])}
    with running(models, ServerSettings(api_keys=("k",), max_body=10_000)) as server:
        assert client_of(server, api_key="k").models.list().models
        with pytest.raises(TypeSafeAuthenticationError, match="api key: expected this server's"):
            client_of(server).system_one("a star", QUESTIONS)
        with pytest.raises(TypeSafeAPIError, match="413 body: expected at most 10000 bytes"):
            client_of(server, api_key="k").system_one(Image(bytes(20_000)), QUESTIONS)


def posted(server: RunningServer, body: bytes, path: str = PATH, **headers: str) -> tuple[int, Any]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data=body, headers=given)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


FORM = b'--b\r\ncontent-disposition: form-data; name="request"\r\n\r\n%s\r\n--b--\r\n'


def test_a_form_of_another_sites_page_is_refused(decider: RunningServer) -> None:
    """Browsers send forms without asking, but not with this header."""
    asked = {
        "model": "reduced",
        "state": "a star",
        "questions": {"a": {"type": "noul", "instructions": "is there a star ?"}},
    }
    body, kind = FORM % json.dumps(asked).encode(), "multipart/form-data; boundary=b"
    assert posted(decider, body, content_type=kind, authorization="Bearer x")[0] == 200
    status, answer = posted(decider, body, content_type=kind)
    assert (status, answer["detail"][:14]) == (415, "authorization:")
    status, answer = posted(decider, body, "/v1/decisions", content_type=kind, authorization="Bearer x")
    assert (status, answer["error"]["message"][:13]) == (415, "content-type:")
    status, answer = posted(decider, b"x", content_type="application/json", content_encoding="zstd")
    assert (status, answer["detail"][:17]) == (415, "content-encoding:")
    assert posted(decider, body, content_type="application/json")[0] in (200, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"--",
        b"--b",
        b"--b--\r\n",
        FORM[:-6],
        FORM.replace(b"name", b"filename"),
        FORM.replace(b"--b--", b"--b\r\ncontent-disposition: form-data; name=\"request\"\r\n\r\n2\r\n--b--"),
        b"--\r\n" * 100_000,
        b"--b\r\n" + b"content-disposition:" * 100_000 + b"\r\n\r\n\r\n--b--",
        b"\r\n--b",
    ],
    ids=range(9),
)  # fmt: skip
def test_a_broken_form_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="body: expected a form of at most 256 parts"):
        form_parts(body)


def test_a_part_may_hold_any_bytes() -> None:
    content = bytes(range(256)) + b"\r\n--\r\n\r\n--c--\r\n"
    assert form_parts(FORM % content) == {"request": content}


@pytest.mark.parametrize("new", [None, 0, True, "", "x", [], [0], {}, {"x": 1}, 1.5], ids=repr)
def test_every_field_with_a_value_of_every_type_gets_an_answer_or_a_named_error(
    decider: RunningServer, new: Any
) -> None:
    good = {
        "model": "reduced",
        "state": {"seen": "star"},
        "questions": {
            "a": {"type": "noul", "instructions": "is it red ?", "criteria": {"true": "red"}},
            "b": {"type": "choice", "instructions": "is it red ?", "criteria": {"red": None, "blue": "sky"}},
            "c": {"type": "score", "criteria": ["zero", "one"]},
        },
        "trio": {"sharing": "each"},
    }
    for path in places(good):
        body = json.dumps(with_value(good, path, new)).encode()
        status, answer = decider.post(body, path=PATH)
        if status == 200:
            assert answer["answers"].keys() == answer["diagnostics"].keys()
            continue
        assert status in (400, 404, 422), (path, answer)
        (problem,) = answer["detail"] if status == 422 else ({"msg": answer["detail"], "loc": ["body"]},)
        assert problem["loc"][0] == "body"
        assert problem["msg"], answer
