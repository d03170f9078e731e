"""``/v1/responses``, the present default of OpenAI's client, gets the answers of chat completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.pictures import random_picture
from tests.serving.server import image_url, running, slowed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.server import RunningServer
    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.pipeline import Pipeline

PICTURE = random_picture(48, 48)


def turn(text: str, *urls: str, detail: str = "auto") -> list[Any]:
    images = [{"type": "input_image", "image_url": url, "detail": detail} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "input_text", "text": text}]}]


ASKED = turn("w1 w2", image_url(PICTURE))


@pytest.fixture(scope="module")
def own(pipeline: Pipeline) -> Generation:
    """The pipeline's answer to ``ASKED``."""
    answer = pipeline.generate(PICTURE, "w1 w2")
    _ = answer.text
    return answer


def ask(server: RunningServer, **fields: Any) -> Any:
    fields = {"model": "reduced", "input": ASKED, **fields}
    return server.client().responses.create(**fields)


def test_a_response_is_the_pipelines_own_answer(server: RunningServer, own: Generation) -> None:
    response, statistics = ask(server), own.statistics
    assert response.output_text == own.text
    assert response.object == "response"
    assert response.model == "reduced"
    assert response.error is None
    is_cut = own.token_ids[-1] >= 3
    assert response.status == ("incomplete" if is_cut else "completed")
    assert response.usage.input_tokens == statistics.text_tokens + statistics.visual_tokens
    assert response.usage.output_tokens == statistics.new_tokens
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.visual_tokens == 51
    assert response.store is False


def test_a_text_alone_is_a_question(server: RunningServer, pipeline: Pipeline) -> None:
    answer = ask(server, input="w3 w4", max_output_tokens=3)
    assert answer.output_text == pipeline.generate(None, "w3 w4", max_new_tokens=3).text
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"


def test_instructions_are_the_system_prompt(server: RunningServer, pipeline: Pipeline) -> None:
    own = pipeline.generate(PICTURE, "w1 w2", system="w9").text
    assert ask(server, instructions="w9").output_text == own


def test_a_conversation_goes_on_with_the_output_as_it_came(server: RunningServer, pipeline: Pipeline) -> None:
    first = ask(server, max_output_tokens=4)
    follow = [*ASKED, *first.output, {"role": "user", "content": "w5"}]
    own = pipeline.generate(PICTURE, "w5", history=[("w1 w2", first.output_text)], max_new_tokens=5)
    assert ask(server, input=follow, max_output_tokens=5).output_text == own.text


def test_a_stream_has_openais_events_in_order(server: RunningServer, own: Generation) -> None:
    events = list(ask(server, stream=True))
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 3
    last = events[-1]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{last.response.status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == own.text
    assert events[-4].text == own.text
    assert last.response.output_text == own.text
    assert last.response.usage.output_tokens == own.statistics.new_tokens
    assert {event.response.id for event in (events[0], last)} == {last.response.id}


def test_the_clients_stream_helper_collects_the_response(server: RunningServer, own: Generation) -> None:
    asked: Any = {"model": "reduced", "input": ASKED}
    with server.client().responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
    assert "response.output_text.delta" in kinds
    assert own.text


def test_settings_have_their_effect(server: RunningServer, pipeline: Pipeline) -> None:
    cold = ask(server, temperature=0, top_p=1.0)
    assert cold.output_text == pipeline.generate(PICTURE, "w1 w2", temperature=0.0).text
    scored = ask(server, include=["message.output_text.logprobs"], top_logprobs=2, max_output_tokens=3)
    entries = scored.output[0].content[0].logprobs
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    kept = ask(server, extra_body={"trio": {"kept": True}}, max_output_tokens=1)
    assert [stage["kept"] for stage in kept.trio["images"][0]["stages"]] == [51, 14, 6]
    low = ask(server, model="full", input=turn("w1", image_url(PICTURE), detail="low"), max_output_tokens=1)
    assert low.model == "reduced"


ERRORS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str | None, str]] = {
    "model": ({"model": "other"}, openai.NotFoundError, "model", "model: expected"),
    "unknown": ({"extra_body": {"best": 1}}, openai.BadRequestError, "best", "best: not a field"),
    "stored": (
        {"previous_response_id": "resp_1"},
        openai.BadRequestError,
        "previous_response_id",
        "Expected",
    ),
    "background": ({"background": True}, openai.BadRequestError, "background", "background: "),
    "tools": (
        {"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]},
        openai.BadRequestError,
        "tools",
        "calls no functions",
    ),
    "length": (
        {"max_output_tokens": 9999},
        openai.BadRequestError,
        "max_output_tokens",
        "^Error code: 400.*max_output_tokens: expected at most",
    ),
    "zero": (
        {"max_output_tokens": 0},
        openai.BadRequestError,
        "max_output_tokens",
        "max_output_tokens: Expected",
    ),
    "hot": ({"temperature": 3}, openai.BadRequestError, "temperature", "temperature: Expected"),
    "image": (
        {"instructions": "w1", "input": turn("w1", "data:image/png;base64,AAAA")},
        openai.BadRequestError,
        "input",
        r"input\[0\]\.content\[0\]|no known format",
    ),
    "address": (
        {"instructions": "w1", "input": turn("w1", "http://images.example/a.png")},
        openai.BadRequestError,
        "input",
        r"input\[0\]\.content\[0\]: expected data:image",
    ),
    "last_turn": (
        {"input": [{"role": "assistant", "content": "w1"}]},
        openai.BadRequestError,
        None,
        "input: expected the last turn",
    ),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "thing"}}}},
        openai.BadRequestError,
        "text.format",
        "text.format: expected a",
    ),
    "empty": ({"input": []}, openai.BadRequestError, "input", "input: "),
}


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_names_the_field_of_this_interface(
    server: RunningServer, case: str, is_streamed: bool
) -> None:
    fields, kind, param, expected = ERRORS[case]
    with pytest.raises(kind, match=expected) as raised:
        ask(server, stream=is_streamed, **fields)
    assert raised.value.param == param


def test_an_answer_that_fails_in_its_midst_ends_with_an_error_event(reduced_bundle: Path) -> None:
    from trio_edge.runtime.pipeline import Pipeline

    def load() -> Pipeline:
        return slowed(Pipeline.from_bundle(reduced_bundle), 0.05)

    with running({"reduced": load}) as server:
        stream = iter(ask(server, stream=True))
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        server.workers["reduced"].loaded.result().close()
        *_, last = stream
        assert last.type == "error"
        assert "pipeline: expected an open one" in last.message
