"""``/v1/decisions``: OpenAI's own client gets the pipeline's own probabilities, and every wrong field is named."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.bundles import export
from tests.pictures import random_picture
from tests.serving.server import image_url, running, slowed_decisions, until
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.decisions.questions import Decision, Question
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.decisions import DecisionWriter
from trio_edge.serving.answers.job import Decided
from trio_edge.serving.answers.worker import kept_report
from trio_edge.serving.requests.decisions import parse_decisions
from trio_edge.serving.requests.protocol import TextPart
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from tests.serving.server import RunningServer

PICTURE = Image.open(Path(__file__).parents[2] / "examples" / "pictures" / "shapes-96x96.png").convert("RGB")
STAR: dict[str, Any] = {"type": "predicate", "instructions": "is there a star ?", "name": "star"}
COLOR: dict[str, Any] = {
    "type": "choice",
    "instructions": "what color is the digit 3 ?",
    "choices": [{"value": "red"}, {"value": "green", "description": None}, {"value": "blue"}],
}
COUNT: dict[str, Any] = {
    "type": "score",
    "instructions": [{"type": "input_text", "text": "how many circles are there ?"}],
    "levels": [{"label": "zero"}, {"label": "one"}, {"label": "two"}],
    "name": "count",
}
OWN = [
    Question.yes_no("is there a star ?"),
    Question.choice("what color is the digit 3 ?", ["red", "green", "blue"]),
    Question.score("how many circles are there ?", ["zero", "one", "two"]),
]
PATH = "/v1/decisions"


def turn(*urls: str, text: str = "", detail: str = "auto") -> dict[str, Any]:
    images = [{"type": "input_image", "image_url": url, "detail": detail} for url in urls]
    return {"role": "user", "content": [*images, *([{"type": "input_text", "text": text}] if text else [])]}


def decide(server: RunningServer, *questions: dict[str, Any], **fields: Any) -> Any:
    asked: dict[str, Any] = {"model": "reduced", "input": [turn(image_url(PICTURE))], **fields}
    return server.client().decisions.create(questions=list(questions), **asked)


def assert_equal(answers: list[Any], own: list[Decision]) -> None:
    for answer, decision in zip(answers, own, strict=True):
        if answer.type == "predicate":
            assert answer.probability == pytest.approx(decision.probabilities[0], abs=1e-6)
        else:
            assert [one.probability for one in answer.probabilities] == pytest.approx(
                decision.probabilities, abs=1e-6
            )
            assert answer.confidence == max(one.probability for one in answer.probabilities)
        assert answer.diagnostics["label_mass"] == pytest.approx(decision.label_mass, abs=1e-6)
        assert tuple(answer.diagnostics["kept_tokens"]) == decision.statistics.kept_tokens
        assert answer.diagnostics["visual_tokens"] == decision.statistics.visual_tokens


def test_answers_are_the_pipelines_own_in_order(decider: RunningServer, tiny: Pipeline) -> None:
    decision = decide(decider, STAR, COLOR, COUNT)
    assert decision.model == "reduced"
    star, color, count = decision.answers
    assert_equal(decision.answers, tiny.decide(PICTURE, OWN))
    assert [answer.type for answer in decision.answers] == ["predicate", "choice", "score"]
    assert [answer.name for answer in decision.answers] == ["star", None, "count"]
    assert color.choice == "green"
    assert [one.value for one in color.probabilities] == ["red", "green", "blue"]
    assert [(one.label, one.value) for one in count.probabilities] == [("zero", 0), ("one", 1), ("two", 2)]
    assert count.score == pytest.approx(sum(one.value * one.probability for one in count.probabilities))
    assert 0 < star.probability < 1


def test_usage_counts_each_prompt_and_what_came_from_the_cache(
    decider: RunningServer, tiny: Pipeline
) -> None:
    usage, own = decide(decider, STAR, COLOR, COUNT).usage, tiny.decide(PICTURE, OWN)
    prompts = [one.statistics.text_tokens + one.statistics.visual_tokens for one in own]
    cached = [one.statistics.cached_tokens for one in own]
    assert usage.input_tokens == sum(prompts)
    assert cached[0] == 0
    assert all(192 < tokens < prompt for tokens, prompt in zip(cached[1:], prompts[1:]))
    assert usage.input_tokens_details.cached_tokens == sum(cached)
    assert usage.output_tokens == 3
    assert usage.total_tokens == usage.input_tokens + 3
    assert usage.visual_tokens == 192
    assert tuple(usage.kept_tokens) == own[0].statistics.kept_tokens
    assert decide(decider, STAR, COLOR, extra_body={"trio": {"sharing": "each"}}).usage.to_dict()[
        "input_tokens_details"
    ] == {"cached_tokens": 0, "cache_write_tokens": 0}


def test_our_own_options_reach_the_pipeline(decider: RunningServer, tiny: Pipeline) -> None:
    options: dict[str, Any] = {"sharing": "each", "both_orders": True}
    decision = decide(decider, STAR, COLOR, extra_body={"trio": options})
    assert "kept" not in decision.answers[0].diagnostics
    assert_equal(decision.answers, tiny.decide(PICTURE, OWN[:2], **options))
    assert decision.answers[0].probability != decide(decider, STAR, COLOR).answers[0].probability
    body = json.dumps({**GOOD, "trio": options}).encode()
    given = msgspec.structs.asdict(parse_decisions(body, max_parts=9)[1].asking.options)
    assert given == {**options, "kept": False, "level": None}


def test_the_boxes_of_each_questions_kept_tokens_come_if_they_are_asked_for(
    decider: RunningServer, tiny: Pipeline
) -> None:
    options: dict[str, Any] = {"sharing": "each", "kept": True}
    answers = decide(decider, STAR, COLOR, extra_body={"trio": options}).answers
    for answer, decision in zip(answers, tiny.decide(PICTURE, OWN[:2], sharing="each"), strict=True):
        own, found = kept_report(decision, tiny.manifest.schedule.stages), answer.diagnostics["kept"]
        assert found["images"] == own["images"]
        assert found["graph_ms"].keys() == own["graph_ms"].keys()
        (image,) = found["images"]
        assert (image["width"], image["height"]) == PICTURE.size
        assert [stage["kept"] for stage in image["stages"]] == [192, *answer.diagnostics["kept_tokens"]]
    assert answers[0].diagnostics["kept"]["images"] != answers[1].diagnostics["kept"]["images"]


def test_a_question_in_both_orders_counts_the_cache_once(checkpoint: Path) -> None:
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
    questions = [Question.choice(text, {"w5": "w9", "w6": ""}) for text in ("w1", "w2")]
    with Pipeline.from_bundle(export(checkpoint, schedule=schedule, follow_ups=True)) as pipeline:
        first, second = pipeline.decide(random_picture(48, 48), questions, sharing="joint", both_orders=True)
    assert first.statistics.cached_tokens == 0
    assert 51 < second.statistics.cached_tokens < 51 + second.statistics.text_tokens


def test_text_alone_can_be_the_input(decider: RunningServer, tiny: Pipeline) -> None:
    text = "there is a red star ."
    own = tiny.decide(None, OWN[:1], evidence=text)
    assert_equal(decide(decider, STAR, input=text).answers, own)
    assert_equal(decide(decider, STAR, input=[turn(text=text)]).answers, own)


def test_a_conversation_is_evidence(decider: RunningServer, tiny: Pipeline) -> None:
    """The question follows the last user turn's images and text; after another turn it is a turn of its own."""
    said = [{"type": "output_text", "text": "a star"}, {"type": "refusal", "refusal": "no"}]
    before = [
        {"role": "developer", "content": "red"},
        turn(image_url(PICTURE), text="what is this ?"),
        {"role": "assistant", "content": said, "type": "message", "phase": "final_answer"},
    ]
    own = [
        {"role": "system", "content": [{"type": "text", "text": "red"}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is this ?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": text} for text in ("a star", "no")]},
        {"role": "user", "content": ""},
    ]
    assert_equal(decide(decider, STAR, input=before).answers, list(tiny.iter_decisions(own, OWN[:1])))
    own[-1]["content"] = "blue"
    after = [*before, {"role": "user", "content": "blue"}]
    assert_equal(decide(decider, STAR, input=after).answers, list(tiny.iter_decisions(own, OWN[:1])))


def test_json_is_compact_text_and_parts_stay_in_order() -> None:
    data = [{"a": [1, None, "é"]}, {}]
    body = {
        "model": "m",
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_json", "data": data}, {"type": "input_text", "text": "x"}],
            }
        ],
        "questions": [
            {
                **STAR,
                "instructions": [
                    {"type": "input_text", "text": "look"},
                    {"type": "input_json", "data": {"b": True}},
                ],
            }
        ],
    }
    _, (chat, asking, _) = parse_decisions(json.dumps(body).encode(), max_parts=9)
    assert [part.text for part in chat.messages[0].parts] == ['[{"a":[1,null,"é"]},{}]', "x"]  # type: ignore[union-attr]
    assert asking.questions[0].text == 'look\n{"b":true}'


def test_images_of_a_question_come_after_the_shared_ones(checkpoint: Path) -> None:
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)), budget="image")
    bundle = export(checkpoint, schedule=schedule, max_images=3, follow_ups=True)
    shared, mine = random_picture(48, 48), random_picture(40, 56, seed=3)
    choice = {"type": "choice", "instructions": "w1", "choices": [{"value": "w5"}, {"value": "w6"}]}
    seen = [{"type": "input_image", "image_url": image_url(mine)}, {"type": "input_text", "text": "w2"}]
    questions = [{**choice, "instructions": seen}, choice, {**choice, "instructions": "w3"}]
    with running({"reduced": partial(Pipeline.from_bundle, bundle)}) as server:
        decision = decide(server, *questions, input=[turn(image_url(shared))])
    with Pipeline.from_bundle(bundle) as pipeline:
        asked = [Question.choice(text, ["w5", "w6"]) for text in ("w2", "w1", "w3")]
        own = [*pipeline.decide([shared, mine], asked[:1]), *pipeline.decide(shared, asked[1:])]
    assert_equal(decision.answers, own)
    assert [answer.diagnostics["visual_tokens"] for answer in decision.answers] == [
        one.statistics.visual_tokens for one in own
    ]


def test_text_between_images_names_them() -> None:
    """The model sees all images first, those of a question after those of the input."""

    def texts_of(*parts: str) -> list[dict[str, Any]]:
        urls = {"one", "two", "three", "four"}
        return [
            {"type": "input_image", "image_url": part}
            if part in urls
            else {"type": "input_text", "text": part}
            for part in parts
        ]

    def read(turns: list[list[str]], instructions: list[str]) -> tuple[list[list[str]], str]:
        body = {
            "model": "m",
            "input": [{"role": "user", "content": texts_of(*parts)} for parts in turns],
            "questions": [{**STAR, "instructions": texts_of(*instructions)}],
        }
        _, (chat, asking, _) = parse_decisions(json.dumps(body).encode(), max_parts=20)
        found = [
            [part.text if isinstance(part, TextPart) else part.image_url.url for part in turn.parts]
            for turn in chat.messages
        ]
        return found[:-1], asking.questions[0].text

    assert read([["before:", "one", "after:", "two"]], ["?"]) == (
        [["one", "two", "before:\n[image 1]\nafter:\n[image 2]"]],
        "?",
    )
    for parts in (["a", "one", "two", "b"], ["one", "b"], ["a", "b", "one"], ["a"]):  # nothing is between
        assert read([parts], ["?"]) == ([parts], "?")
    # An earlier turn stays as it is; its images count.
    turns = [["one", "a", "two"], ["three", "b"]]
    assert read(turns, ["like", "four", "or", "one", "?"]) == (turns, "like\n[image 4]\nor\n[image 5]\n?")


def test_values_keep_their_types() -> None:
    choices = [{"value": True, "description": "open"}, {"value": "ajar"}, {"value": False}]
    body = {"model": "m", "input": "x", "questions": [{**COLOR, "choices": choices}]}
    writer = DecisionWriter(bytearray(json.dumps(body).encode()), 9)
    assert [option.name for option in writer.asking.questions[0].options] == ["true", "ajar", "false"]

    async def begun() -> dict[str, Any]:
        writer.begin("m", None)  # type: ignore[arg-type]
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        return writer.result([Decided(0, [0.2, 0.1, 0.7], 0.0, {})], usage)

    (answer,) = asyncio.run(begun())["answers"]
    assert answer["choice"] is False
    assert [one["value"] for one in answer["probabilities"]] == [True, "ajar", False]


def test_the_async_client_gets_the_same(decider: RunningServer) -> None:
    async def asked() -> Any:
        async with decider.async_client() as client:
            fields: Any = {"input": [turn(image_url(PICTURE))], "questions": [COLOR]}
            return await client.decisions.create(model="reduced", **fields)

    assert asyncio.run(asked()).answers[0].choice == "green"


def test_detail_chooses_among_the_bundles_of_a_model(decider: RunningServer) -> None:
    for detail, expected in (("low", "reduced"), ("high", "full"), ("original", "full"), ("auto", "reduced")):
        asked = [turn(image_url(PICTURE), detail=detail)]
        assert decide(decider, STAR, input=asked).model == expected


def test_fields_about_caching_and_users_change_nothing(decider: RunningServer) -> None:
    part = {
        "type": "input_image",
        "image_url": image_url(PICTURE),
        "detail": None,
        "prompt_cache_breakpoint": {"mode": "explicit"},
    }
    fields: dict[str, Any] = {
        "prompt_cache_key": "a",
        "prompt_cache_options": {"mode": "explicit", "ttl": "30m"},
        "safety_identifier": "b",
    }
    with_them = decide(decider, COLOR, input=[{"role": "user", "content": [part]}], **fields)
    assert with_them.answers == decide(decider, COLOR).answers


def test_metrics_count_decisions_and_questions(decider: RunningServer) -> None:
    def count(name: str) -> float:
        with urllib.request.urlopen(f"{decider.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        found = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in found if sample.labels.get("model") == "full")

    names = (
        "trio_decisions_total",
        "trio_questions_total",
        "trio_visual_tokens_total",
        "trio_decode_seconds_count",
    )
    before = [count(name) for name in names]
    decide(decider, STAR, COLOR, COUNT, model="full")
    assert [count(name) - old for name, old in zip(names, before)] == [1, 3, 192, 0]


def test_a_client_that_leaves_ends_the_decision_at_the_next_question(
    deciding_bundles: dict[str, Path],
) -> None:
    def load() -> Pipeline:
        return slowed_decisions(Pipeline.from_bundle(deciding_bundles["reduced"]), 0.2)

    with running({"reduced": load}) as server:
        worker = server.workers["reduced"]
        body = json.dumps({"model": "reduced", "input": "a star", "questions": [STAR] * 200}).encode()
        with server.connect() as connection:
            head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: worker._running != {})
        until(lambda: worker._running == {}, seconds=5)  # 40 s for all
        assert decide(server, STAR).answers


def test_a_full_queue_refuses_a_decision(deciding_bundles: dict[str, Path]) -> None:
    models = {"reduced": partial(Pipeline.from_bundle, deciding_bundles["reduced"])}
    with (
        running(models, ServerSettings(max_queue=0)) as server,
        pytest.raises(openai.RateLimitError, match="requests wait"),
    ):
        decide(server, STAR)


def test_a_bundle_without_a_template_is_named(deciding_bundles: dict[str, Path]) -> None:
    def load() -> Pipeline:
        pipeline = Pipeline.from_bundle(deciding_bundles["reduced"])
        pipeline.manifest = msgspec.structs.replace(pipeline.manifest, decisions=None)
        return pipeline

    with (
        running({"reduced": load}) as server,
        pytest.raises(openai.BadRequestError, match="model: expected a bundle with a template") as raised,
    ):
        decide(server, STAR)
    assert raised.value.param == "model"


GOOD: dict[str, Any] = {"model": "reduced", "input": "a star", "questions": [STAR, COLOR, COUNT]}
WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no_model": ({"model": None}, "model: Expected `str`", "model"),
    "no_questions": ({"questions": []}, "questions: ", "questions"),
    "too_many": ({"questions": [STAR] * 401}, "questions: ", "questions"),
    "empty_input": ({"input": []}, "input: ", "input"),
    "number": ({"input": 5}, "input: Expected", "input"),
    "unknown_field": ({"stream": False}, "stream: not a field", "stream"),
    "own_options": ({"trio": {"seen": True}}, r"trio\.seen: not a field", "trio.seen"),
    "sharing": ({"trio": {"sharing": "all"}}, r"trio\.sharing: ", "trio.sharing"),
    "function_call": (
        {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}]},
        r"input\[0\]\.type: Invalid enum value 'function_call'",
        "input[0].type",
    ),
    "function_output": (
        {"input": [{"call_id": "a", "output": "b", "type": "function_call_output"}]},
        r"input\[0\]\.call_id: not a field",
        "input[0].call_id",
    ),
    "role": ({"input": [{"role": "tool", "content": "a"}]}, r"input\[0\]\.role: ", "input[0].role"),
    "file": (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "a"}]}]},
        r"input\[0\]\.content",
        None,
    ),
    "address": (
        {"input": [turn("http://a.example/b.png")]},
        r"input\[0\]\.content\[0\]: expected data:image",
        "input[0].content[0]",
    ),
    "broken_image": (
        {"input": [turn("data:image/png;base64,AAAA")]},
        r"input\[0\]\.content\[0\]: expected an image",
        "input[0].content[0]",
    ),
    "question_image": (
        {"questions": [STAR, {**STAR, "instructions": turn("data:,", text="a")["content"]}]},
        r"questions\[1\]\.instructions\[0\]: expected data:image",
        "questions[1].instructions[0]",
    ),
    "details": (
        {"input": [turn(image_url(PICTURE), detail="low"), turn(image_url(PICTURE), detail="high")]},
        "input: expected one detail",
        "input",
    ),
    "two_images": ({"input": [turn(image_url(PICTURE), image_url(PICTURE))]}, "at most 1", "input"),
    "long": ({"input": "star " * 80}, "text tokens", "input"),
    "many_parts": ({"input": [{"role": "user", "content": "a"}] * 300}, "input: expected at most", "input"),
    "kind": ({"questions": [{**STAR, "type": "box"}]}, r"questions\[0\]\.type: Invalid value 'box'", None),
    "no_text": ({"questions": [{**STAR, "instructions": " "}]}, r"questions\[0\]: question", "questions[0]"),
    "only_image": (
        {"questions": [{**STAR, "instructions": turn(image_url(PICTURE))["content"]}]},
        r"questions\[0\]: question '': expected text",
        "questions[0]",
    ),
    "one_choice": (
        {"questions": [STAR, {**COLOR, "choices": [{"value": "red"}]}]},
        r"questions\[1\]: .*2\.\.255 options, got 1",
        "questions[1]",
    ),
    "twice": (
        {"questions": [{**COLOR, "choices": [{"value": "true"}, {"value": True}]}]},
        "got 'true' twice",
        "questions[0]",
    ),
    "number_choice": (
        {"questions": [{**COLOR, "choices": [{"value": 1}, {"value": 2}]}]},
        r"choices\[0\]\.value: Expected `str \| bool`|Expected `bool \| str`",
        None,
    ),
    "levels": (
        {"questions": [{**COUNT, "levels": [{"label": str(level)} for level in range(11)]}]},
        r"questions\[0\]: .*2\.\.10 levels, got 11",
        "questions[0]",
    ),
    "unknown_word": (
        {"questions": [{**COLOR, "choices": [{"value": "red"}, {"value": "maroon"}]}]},
        "label 'maroon': expected one that the model's tokenizer can write",
        None,
    ),
    "special_token": ({"input": "a </s>"}, "special token", None),
    "deep": (
        {"input": [{"role": "user", "content": [{"type": "input_json", "data": json.loads('{"a":' * 40 + "1" + "}" * 40)}]}]},
        "data: expected at most 32 levels",
        "data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_field_is_refused_by_name(decider: RunningServer, case: str) -> None:
    fields, expected, param = WRONG[case]
    fields = {"model": "reduced", "input": "a star", "questions": [STAR], **fields}
    with pytest.raises(openai.BadRequestError, match=expected) as raised:
        decider.client().post("/decisions", body=fields, cast_to=object)
    assert raised.value.param == param or param is None
    assert raised.value.body["message"].count("\n") == 0


def test_another_model_is_not_found(decider: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError):
        decide(decider, STAR, model="other")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value inside."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inside for place in places(item, (*path, key)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("new", [None, 0, True, "", "x", [], [0], {}, {"x": 1}, 1.5], ids=repr)
def test_every_field_with_a_value_of_every_type_gets_an_answer_or_a_named_error(
    decider: RunningServer, new: Any
) -> None:
    for path in places(GOOD):
        status, answer = decider.post(json.dumps(with_value(GOOD, path, new)).encode(), path=PATH)
        if status == 200:
            assert len(answer["answers"]) == 3
            continue
        assert status in (400, 404), (path, answer)
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert ": " in answer["error"]["message"], answer
