"""Answers of a given form: one of several texts, or JSON that fits a schema."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from tests.bundles import export
from tests.checkpoints import WORDS, save_checkpoint
from tests.pictures import random_picture
from tests.serving.server import image_url, question, running
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.answers.structured import ChoiceConstraint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.serving.server import RunningServer

SHAPE = {
    "type": "object",
    "properties": {
        "shape": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "is_red": {"type": "boolean"},
    },
    "required": ["shape", "count", "is_red"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server whose model writes letter by letter, as a byte-level BPE tokenizer without merges lets it."""
    folder = tmp_path_factory.mktemp("spelling") / "checkpoint"
    save_checkpoint(folder, num_layers=3, num_kv_heads=2, seed=5)
    letters = ["Ċ", "Ġ", *(chr(code) for code in range(ord("!"), ord("~")))]
    words = {word: index for index, word in enumerate([*WORDS[:5], *letters])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(WORDS[:5])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    stages = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
    bundle = export(folder, schedule=stages, max_new_tokens=60)
    with running({"reduced": partial(Pipeline.from_bundle, bundle)}) as server:
        yield server


def ask(server: RunningServer, text: str = "Which?", **fields: Any) -> Any:
    messages: Any = question(text, image_url(random_picture(48, 48)))
    return server.client().chat.completions.create(model="reduced", messages=messages, **fields)


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "shape", "strict": True, "schema": value}}


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_fits_its_schema(spelling: RunningServer, seed: int) -> None:
    answer = ask(spelling, response_format=schema(SHAPE), temperature=1.0, seed=seed)
    value = json.loads(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert list(value) == ["shape", "count", "is_red"]
    assert value["shape"] in ("circle", "square", "star")
    assert value["count"] in range(10)
    assert isinstance(value["is_red"], bool)


STEPS: list[tuple[dict[str, Any], int]] = [
    (SHAPE, 2),
    ({"type": "object", "properties": {"colour": {"const": "dark blue"}}, "required": ["colour"]}, 20),
    (
        {
            "type": "object",
            "properties": {"person": {"type": "boolean"}, "state": {"enum": ["open", "closed"]}},
            "required": ["person", "state"],
        },
        2,
    ),
]


@pytest.mark.parametrize(("wanted", "times_fewer"), STEPS, ids=("shape", "const", "gate"))
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_a_schema_leaves_no_choice_for_take_no_step_each(
    spelling: RunningServer, wanted: dict[str, Any], times_fewer: int, temperature: float
) -> None:
    """Log probabilities need all steps, and change no answer."""
    wanted = {**wanted, "additionalProperties": False}
    form: dict[str, Any] = {"response_format": schema(wanted), "temperature": temperature, "seed": 4}
    answer = ask(spelling, **form)
    assert json.loads(answer.choices[0].message.content).keys() == wanted["properties"].keys()
    usage = answer.usage.model_dump()
    assert times_fewer * usage["decode_steps"] <= usage["completion_tokens"]
    whole = ask(spelling, **form, logprobs=True)
    assert whole.usage.model_dump()["decode_steps"] == whole.usage.completion_tokens - 1
    if temperature == 0:
        assert whole.choices[0].message.content == answer.choices[0].message.content


def test_without_a_schema_the_same_model_writes_no_json(spelling: RunningServer) -> None:
    with pytest.raises(json.JSONDecodeError):
        json.loads(ask(spelling).choices[0].message.content)


def test_the_clients_parse_helper_returns_an_object(spelling: RunningServer) -> None:
    import pydantic

    class Shape(pydantic.BaseModel):
        shape: Literal["circle", "square", "star"]
        count: Literal[1, 2, 3]

    messages: Any = question("Which?", image_url(random_picture(48, 48)))
    answer = spelling.client().chat.completions.parse(
        model="reduced", messages=messages, response_format=Shape
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert parsed.count in (1, 2, 3)


def test_an_answer_is_one_of_the_choices(spelling: RunningServer, server: RunningServer) -> None:
    for running_server, choices in ((spelling, ["yes", "no", "no idea"]), (server, ["w7", "w7 w8", "w9"])):
        extra = {"structured_outputs": {"choice": choices}}
        answers = [
            ask(running_server, "w1", extra_body=extra, temperature=2.0, seed=seed).choices[0]
            for seed in range(8)
        ]
        assert {answer.message.content for answer in answers} <= set(choices)
        assert len({answer.message.content for answer in answers}) > 1
        assert {answer.finish_reason for answer in answers} == {"stop"}


def test_greedy_choices_take_the_likeliest_token_that_is_allowed(
    pipeline: Pipeline, server: RunningServer
) -> None:
    logits = pipeline.generate(random_picture(48, 48), "w1", max_new_tokens=1)
    _ = logits.text
    ids = {f"w{number}": 8 + number for number in range(20)}
    expected = max(ids, key=lambda word: logits.first_logits[ids[word]])
    extra = {"structured_outputs": {"choice": list(ids)}}
    assert ask(server, "w1", extra_body=extra).choices[0].message.content == expected


def test_a_choice_that_starts_another_may_end_or_go_on() -> None:
    constraint = ChoiceConstraint([[5], [5, 6]], stop_ids=[2], num_tokens=8)
    assert constraint.allowed().nonzero()[0].tolist() == [5]
    constraint.add(5)
    assert constraint.allowed().nonzero()[0].tolist() == [2, 6]
    constraint.add(6)
    assert constraint.allowed().nonzero()[0].tolist() == [2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": schema({"type": "thing"})}, "a schema that llguidance knows"),
        ({"response_format": schema({"type": "string", "pattern": "("})}, "a schema that llguidance knows"),
        ({"response_format": {"type": "json_schema"}}, 'expected "json_schema" with the type'),
        ({"response_format": {"type": "xml"}}, "response_format.type: Invalid"),
        ({"extra_body": {"structured_outputs": {"choice": []}}}, "structured_outputs.choice: Expected"),
        ({"extra_body": {"structured_outputs": {"choice": ["ü"]}}}, "tokenizer can write, got 'ü'"),
        (
            {"extra_body": {"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}},
            "an answer that may end",
        ),
        (
            {
                "response_format": {"type": "json_object"},
                "extra_body": {"structured_outputs": {"choice": ["a"]}},
            },
            "got both",
        ),
    ],
)
def test_an_impossible_form_is_refused(
    spelling: RunningServer, fields: dict[str, Any], expected: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=expected):
        ask(spelling, **fields)


def test_a_tokenizer_of_words_cannot_spell_json(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="tokenizer can spell JSON"):
        ask(server, "w1", response_format={"type": "json_object"})
