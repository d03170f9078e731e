"""OpenAI's own Python client gets the pipeline's own answers, whole and streamed, and errors as its exceptions."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec
import openai
import pytest

from tests.pictures import PHOTOGRAPHS, photograph, random_picture
from tests.serving.server import image_url, question

if TYPE_CHECKING:
    from tests.serving.server import RunningServer
    from trio_edge.runtime.answer import Generation
    from trio_edge.runtime.pipeline import Pipeline

PICTURE = random_picture(48, 48)
ASKED = question("w1 w2", image_url(PICTURE))


@pytest.fixture(scope="module")
def own(pipeline: Pipeline) -> Generation:
    """The pipeline's answer to ``ASKED``."""
    answer = pipeline.generate(PICTURE, "w1 w2")
    _ = answer.text
    return answer


def ask(server: RunningServer, **fields: Any) -> Any:
    fields = {"model": "reduced", "messages": ASKED, **fields}
    return server.client().chat.completions.create(**fields)


def text_of(chunks: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def test_an_answer_is_the_pipelines_own(server: RunningServer, own: Generation) -> None:
    answer = ask(server)
    assert answer.choices[0].message.content == own.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.model == "reduced"
    assert own.text


@pytest.mark.parametrize("photo", PHOTOGRAPHS)
def test_a_photographs_file_is_answered_as_the_pipeline_answers_it(
    server: RunningServer, pipeline: Pipeline, photo: str
) -> None:
    path = photograph(photo)
    kind = {".jpg": "jpeg", ".png": "png"}[path.suffix]
    url = f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    answer = ask(server, messages=question("w1 w2", url))
    own = pipeline.generate(path, "w1 w2")
    assert answer.choices[0].message.content == own.text
    assert answer.usage.visual_tokens == own.statistics.visual_tokens


def test_usage_counts_the_prompt_before_reduction(server: RunningServer, own: Generation) -> None:
    usage, statistics = ask(server).usage, own.statistics
    assert usage.prompt_tokens == statistics.text_tokens + statistics.visual_tokens
    assert usage.completion_tokens == statistics.new_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.visual_tokens == statistics.visual_tokens == 51
    assert tuple(usage.kept_tokens) == statistics.kept_tokens == (14, 6)
    assert usage.ttft_ms > 0


def test_streamed_pieces_join_to_the_whole_answer(server: RunningServer, own: Generation) -> None:
    chunks = list(ask(server, stream=True))
    assert text_of(chunks) == own.text
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")


def test_the_last_chunk_has_the_usage_if_it_is_asked_for(server: RunningServer) -> None:
    *_, last = ask(server, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.visual_tokens == 51
    assert all(chunk.usage is None for chunk in ask(server, stream=True))


def test_the_async_client_gets_the_same(server: RunningServer, own: Generation) -> None:
    async def both() -> tuple[str, str]:
        async with server.async_client() as client:
            create = client.chat.completions.create
            whole = await create(model="reduced", messages=ASKED)
            chunks = [chunk async for chunk in await create(model="reduced", messages=ASKED, stream=True)]
            return whole.choices[0].message.content, text_of(chunks)

    assert asyncio.run(both()) == (own.text, own.text)


def test_the_stream_helper_collects_the_answer(server: RunningServer, own: Generation) -> None:
    stop = own.text.split(" ")[3]  # at an answer's limit the helper raises
    with server.client().chat.completions.stream(model="reduced", messages=ASKED, stop=stop) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.content == own.text[: own.text.index(stop)]


def test_an_answer_without_an_image(server: RunningServer, pipeline: Pipeline) -> None:
    answer = ask(server, messages=[{"role": "user", "content": "w3 w4"}])
    assert answer.choices[0].message.content == pipeline.generate(None, "w3 w4").text
    assert answer.usage.visual_tokens == 0


def test_a_conversation_goes_on(server: RunningServer, pipeline: Pipeline) -> None:
    first = ask(server, max_tokens=4).choices[0].message
    follow = [*ASKED, first, {"role": "user", "content": "w5"}]
    own = pipeline.generate(PICTURE, "w5", history=[("w1 w2", first.content)], max_new_tokens=5)
    assert ask(server, messages=follow, max_tokens=5).choices[0].message.content == own.text


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_cut_at_its_limit(server: RunningServer, name: str, own: Generation) -> None:
    answer = ask(server, **{name: 3})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"
    assert own.text.startswith(answer.choices[0].message.content)


def test_sampling_repeats_with_a_seed_and_equals_the_pipelines(
    server: RunningServer, pipeline: Pipeline
) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    own = pipeline.generate(PICTURE, "w1 w2", **settings, top_k=40, repetition_penalty=1.2).text
    extra = {"top_k": 40, "repetition_penalty": 1.2}
    assert ask(server, **settings, extra_body=extra).choices[0].message.content == own
    assert ask(server, **settings, extra_body=extra).choices[0].message.content == own


def test_ignore_eos_fills_the_answer_up(server: RunningServer) -> None:
    assert ask(server, max_tokens=12, extra_body={"ignore_eos": True}).usage.completion_tokens == 12


def test_a_stop_text_ends_the_answer_before_it(server: RunningServer, own: Generation) -> None:
    words = own.text.split(" ")
    stop = f"{words[2]} {words[3]}"  # longer than a piece
    expected = own.text[: own.text.index(stop)]
    answer = ask(server, stop=[stop, "never"])
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].finish_reason == "stop"
    assert text_of(ask(server, stop=stop, stream=True)) == expected


def test_detail_chooses_among_the_bundles_of_a_model(server: RunningServer) -> None:
    url = image_url(PICTURE)
    models = {
        (asked, detail): ask(
            server, model=asked, messages=question("w1", url, detail=detail), max_tokens=1
        ).model
        for asked in ("reduced", "full")
        for detail in ("low", "high", "auto")
    }
    assert models == {
        (asked, detail): {"low": "reduced", "high": "full", "auto": asked}[detail] for asked, detail in models
    }


def test_detail_chooses_no_bundle_that_cannot_take_the_request(server: RunningServer) -> None:
    """With other limits than its twins, a bundle would refuse what the named one answers."""
    from trio_edge.serving.answers.endpoint import _chosen_worker
    from trio_edge.serving.requests.protocol import parse_chat

    def chosen(*urls: str, **fields: Any) -> str:
        body = {"model": "full", "messages": question("w1", *urls, detail="low"), **fields}
        chat = parse_chat(json.dumps(body).encode(), max_parts=9)
        return _chosen_worker(workers, chat)[0].name  # type: ignore[arg-type]

    own = {name: worker.manifest for name, worker in server.workers.items()}
    manifests = {
        "full": msgspec.structs.replace(own["full"], max_images=2),
        "reduced": msgspec.structs.replace(own["reduced"], max_new_tokens=5),
    }
    workers = {
        name: SimpleNamespace(name=name, is_ready=True, has_loaded=True, manifest=found)
        for name, found in manifests.items()
    }
    assert chosen("a") == "reduced"
    assert chosen("a", "b") == "full"
    assert chosen("a", max_tokens=5) == "reduced"
    assert chosen("a", max_tokens=6) == "full"


def test_models_are_listed(server: RunningServer) -> None:
    listed = list(server.client().models.list())
    assert [model.id for model in listed] == ["reduced", "full"]
    assert listed[0].trio["stages"] == [{"layer": 1, "keep": 14}, {"layer": 2, "keep": 6}]
    assert server.client().models.retrieve("full").trio["average_keep"] == 1.0


ERRORS: dict[str, tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = {
    "unknown_model": ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
    "unknown_field": ({"extra_body": {"best": 1}}, openai.BadRequestError, "unknown_parameter", "best"),
    "stored": ({"store": True}, openai.BadRequestError, "unsupported_parameter", "store"),
    "penalty": ({"presence_penalty": 5}, openai.BadRequestError, "invalid_value", "presence_penalty"),
    "tools": (
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        openai.BadRequestError,
        "unsupported_parameter",
        "tools",
    ),
    "too_hot": ({"temperature": 3}, openai.BadRequestError, "invalid_value", "temperature"),
    "too_long_an_answer": (
        {"max_tokens": 1000},
        openai.BadRequestError,
        "context_length_exceeded",
        "max_tokens",
    ),
    "too_long_a_prompt": (
        {"messages": question("w1 " * 80)},
        openai.BadRequestError,
        "context_length_exceeded",
        "messages",
    ),
    "too_many_images": (
        {"messages": question("w1", image_url(), image_url())},
        openai.BadRequestError,
        "context_length_exceeded",
        "messages",
    ),
    "special_token": ({"messages": question("w1 </s>")}, openai.BadRequestError, "invalid_value", None),
    "last_turn_is_not_the_users": (
        {"messages": [{"role": "assistant", "content": "w1"}]},
        openai.BadRequestError,
        "invalid_value",
        None,
    ),
    "no_messages": ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
}


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_the_clients_exception(server: RunningServer, case: str, is_streamed: bool) -> None:
    fields, kind, code, param = ERRORS[case]
    with pytest.raises(kind) as raised:
        ask(server, stream=is_streamed, **fields)
    assert raised.value.code == code
    assert raised.value.param == param
    assert raised.value.body["message"].count("\n") == 0


def test_stream_options_need_a_streamed_answer(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options: expected it with") as raised:
        ask(server, stream_options={"include_usage": True})
    assert raised.value.param == "stream_options"
