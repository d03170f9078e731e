"""Fields that clients send by habit: taken where they ask for nothing, done where they ask for something."""

from __future__ import annotations

import json
import math
import re
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest

import trio_edge
from tests.pictures import random_picture
from tests.serving.server import image_url, question, running
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.serving.server import RunningServer

PICTURE = random_picture(48, 48)
ASKED = question("w1 w2", image_url(PICTURE))


def ask(server: RunningServer, **fields: Any) -> Any:
    fields = {"model": "reduced", "messages": ASKED, **fields}
    return server.client().chat.completions.create(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"parallel_tool_calls": True},
        {"tool_choice": "auto", "tools": []},
        {"service_tier": "auto"},
        {"modalities": ["text"]},
        {"min_p": 0},
        {"min_p": 0.0},
        {"prompt_cache_key": "a", "safety_identifier": "b", "user": "c"},
        {"logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0, "n": 1, "logprobs": False},
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
    ],
    ids=lambda fields: " ".join(fields),
)
def test_a_value_that_asks_for_nothing_changes_nothing(
    server: RunningServer, pipeline: Pipeline, fields: dict[str, Any]
) -> None:
    answer = ask(server, extra_body=fields)
    assert answer.choices[0].message.content == pipeline.generate(PICTURE, "w1 w2").text


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
            "tools: this server calls no functions",
        ),
        ({"tool_choice": "required"}, "tool_choice: this server calls no functions"),
        ({"functions": [{"name": "f"}]}, "functions: this server calls no functions"),
        ({"service_tier": "priority"}, "service_tier: "),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"min_p": 0.1}, "min_p: "),
        ({"seed": 2**63}, "seed: "),
        ({"n": 17}, "n: Expected `int` <= 16"),
        ({"presence_penalty": 2.1}, "presence_penalty: "),
        ({"frequency_penalty": -2.1}, "frequency_penalty: "),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias: Expected `int`"),
        ({"logit_bias": {"100000": 1}}, r"logit_bias: expected token ids in 0\.\.\d+ and numbers"),
        ({"top_logprobs": 2}, 'top_logprobs: expected it with "logprobs": true only'),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: "),
        ({"messages": [{"role": "user", "content": []}]}, r"messages\[\.\.\.\]\.content: |length >= 1"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages: expected a question or an image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_a_value_that_asks_for_more_is_refused_by_name(
    server: RunningServer, fields: dict[str, Any], expected: str
) -> None:
    status, answer = server.ask(**fields)
    assert status == 400
    assert re.search(expected, answer["error"]["message"]), answer


def test_logprobs_are_those_of_the_models_own_distribution(server: RunningServer, pipeline: Pipeline) -> None:
    own = pipeline.generate(PICTURE, "w1 w2", num_logprobs=3)
    text = own.text
    answer = ask(server, logprobs=True, top_logprobs=3, temperature=0.0)
    choice = answer.choices[0]
    assert choice.message.content == text
    entries = choice.logprobs.content
    ended = own.token_ids[-1] in pipeline.manifest.text.stop_token_ids
    assert len(entries) == len(own.token_ids) - ended
    logits = own.first_logits.astype(np.float64)
    expected = np.sort(logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max())[::-1]
    first = entries[0]
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(expected[:3].tolist(), abs=1e-6)
    assert first.logprob == pytest.approx(expected[0], abs=1e-6)
    assert first.bytes == list(first.token.encode())
    assert first.top_logprobs[0].token == first.token
    assert all(entry.logprob <= 0 for entry in entries)
    assert "".join(entry.token for entry in entries).split() == text.split()


def test_a_stream_has_the_same_logprobs(server: RunningServer) -> None:
    whole = ask(server, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in ask(server, logprobs=True, top_logprobs=1, stream=True)]
    streamed = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    assert [(entry.token, entry.logprob) for entry in streamed] == [
        (entry.token, entry.logprob) for entry in whole
    ]
    assert ask(server).choices[0].logprobs is None


def test_n_answers_have_the_seeds_that_follow(server: RunningServer, pipeline: Pipeline) -> None:
    settings = {"temperature": 1.5, "max_tokens": 6}
    own = [
        pipeline.generate(PICTURE, "w1 w2", temperature=1.5, max_new_tokens=6, seed=7 + number)
        for number in range(3)
    ]
    texts = [answer.text for answer in own]
    answer = ask(server, n=3, seed=7, **settings)
    assert [choice.message.content for choice in answer.choices] == texts
    assert len(set(texts)) > 1
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == sum(one.statistics.new_tokens for one in own)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    streamed, reasons = ["", "", ""], dict[int, str]()
    for chunk in ask(server, n=3, seed=7, stream=True, **settings):
        choice = chunk.choices[0]
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
    assert streamed == texts
    assert reasons == {choice.index: choice.finish_reason for choice in answer.choices}


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_forbids_it(
    server: RunningServer, pipeline: Pipeline
) -> None:
    own = pipeline.generate(PICTURE, "w1 w2", max_new_tokens=4)
    assert own.text
    words = ask(server, logit_bias={"9": 100}, max_tokens=4, extra_body={"ignore_eos": True})
    assert words.choices[0].message.content.split() == [pipeline.tokenizer.decode([9])] * 4
    first = str(own.token_ids[0])
    other = ask(server, logit_bias={first: -100}, max_tokens=1).choices[0].message.content
    assert other != pipeline.tokenizer.decode([own.token_ids[0]])


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-1.0, 0.3), (2.0, -0.5)])
def test_penalties_follow_openais_formula(
    server: RunningServer, pipeline: Pipeline, presence: float, frequency: float
) -> None:
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, replayed with the model's own logits of each step."""
    vocabulary = pipeline.manifest.token_embedding.shape[0]
    settings: dict[str, Any] = {"presence_penalty": presence, "frequency_penalty": frequency}
    answer = pipeline.generate(
        PICTURE, "w1 w2", num_logprobs=vocabulary, min_new_tokens=12, max_new_tokens=12, **settings
    )
    assert answer.text
    counts = np.zeros(vocabulary)
    for token, found in zip(answer.token_ids, answer.logprobs):
        scores = np.full(vocabulary, -np.inf)
        scores[found.top_ids] = found.top
        scores -= counts * frequency + (counts > 0) * presence
        scores[list(pipeline.manifest.text.stop_token_ids)] = -np.inf  # min_new_tokens
        assert token == int(scores.argmax())
        counts[token] += 1
    plain = pipeline.generate(PICTURE, "w1 w2", min_new_tokens=12, max_new_tokens=12).token_ids
    assert [*answer.token_ids] != plain or counts.max() == 1
    served = ask(server, max_tokens=12, extra_body={"ignore_eos": True}, **settings)
    assert served.choices[0].message.content == answer.text


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("presence_penalty", 3),
        ("frequency_penalty", math.nan),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {0: math.inf}),
        ("num_logprobs", -1),
    ],
)
def test_a_wrong_setting_in_python_is_refused(pipeline: Pipeline, setting: str, value: Any) -> None:
    from trio_edge.runtime.bundle.errors import ShapeError

    with pytest.raises(ShapeError, match=f"{setting}: expected"):
        pipeline.generate(PICTURE, "w1", **{setting: value})


def opened(server: RunningServer, path: str, **headers: str) -> Any:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    with urllib.request.urlopen(urllib.request.Request(server.url + path, headers=given)) as answer:
        return answer.headers, answer.read()


def test_every_response_has_the_requests_id_or_a_new_one(server: RunningServer) -> None:
    assert opened(server, "/health", x_request_id="mine-1")[0]["x-request-id"] == "mine-1"
    first, second = (opened(server, "/health")[0]["x-request-id"] for _ in range(2))
    assert first != second
    assert len(opened(server, "/health", x_request_id="x" * 200)[0]["x-request-id"]) == 32
    with pytest.raises(openai.BadRequestError) as raised:
        ask(server, n=99, extra_headers={"x-request-id": "mine-2"})
    assert raised.value.request_id == "mine-2"


def test_the_version_is_told(server: RunningServer) -> None:
    assert json.loads(opened(server, "/version")[1]) == {"version": trio_edge.__version__}


def test_only_allowed_origins_may_ask_from_a_browser(reduced_bundle: Path, server: RunningServer) -> None:
    settings = ServerSettings(allowed_origins=("https://robot.example",), api_keys=("k",))
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}, settings) as allowing:
        for origin, allowed in (
            ("https://robot.example", "https://robot.example"),
            ("https://evil.example", None),
        ):
            headers, _ = opened(allowing, "/health", Origin=origin)
            assert headers["access-control-allow-origin"] == allowed
        asked = {
            "Origin": "https://robot.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        request = urllib.request.Request(f"{allowing.url}/v1/responses", headers=asked, method="OPTIONS")
        with urllib.request.urlopen(request) as answer:  # without a key, as browsers ask
            assert answer.status == 200
            assert "authorization" in answer.headers["access-control-allow-headers"]
    assert opened(server, "/health", Origin="https://robot.example")[0]["access-control-allow-origin"] is None


def test_a_larger_limit_is_lowered_where_the_operator_says_so(reduced_bundle: Path) -> None:
    models = {"reduced": partial(Pipeline.from_bundle, reduced_bundle)}
    with running(models, ServerSettings(clamp_max_tokens=True)) as server:
        most = server.workers["reduced"].manifest.max_new_tokens
        for name in ("max_tokens", "max_completion_tokens"):
            answer = ask(server, **{name: 100_000}, extra_body={"ignore_eos": True})
            assert answer.usage.completion_tokens == most
        assert ask(server, max_tokens=2).usage.completion_tokens == 2


def test_each_of_several_keys_opens(reduced_bundle: Path) -> None:
    settings = ServerSettings(api_keys=("first", "second"))
    with running({"reduced": partial(Pipeline.from_bundle, reduced_bundle)}, settings) as server:
        for key in ("first", "second"):
            assert server.client(api_key=key).models.list().data
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="first second").models.list()
