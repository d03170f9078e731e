"""Requests and events as bytes between the server and a replica."""

from __future__ import annotations

import asyncio
import errno
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.serving.server import image_url, question
from trio_edge.serving.answers.job import AnswerJob, Decided, Event, Failed, Finished, Kept, NewText
from trio_edge.serving.fleet.wire import packed_events, packed_request, unpacked_events, unpacked_request
from trio_edge.serving.requests.content import Prompt, read_prompt
from trio_edge.serving.requests.decisions import parse_decisions
from trio_edge.serving.requests.errors import RequestError
from trio_edge.serving.requests.media import MediaReader
from trio_edge.serving.requests.protocol import parse_chat
from trio_edge.serving.settings import ServerSettings

if TYPE_CHECKING:
    from trio_edge.runtime.prompts.chat import Message


def travelled(prompt: Prompt, **fields: object) -> tuple[object, list[Message]]:
    """Return the settings and the messages of a request after its way to a replica."""
    body = {"model": "m", "messages": question("w1"), **fields}
    chat = parse_chat(json.dumps(body).encode(), max_parts=9)

    async def packed() -> bytes:
        return packed_request(AnswerJob(chat, prompt))

    return unpacked_request(asyncio.run(packed()))[:2]


def test_questions_travel_with_their_options() -> None:
    body = {
        "model": "m",
        "input": "w1",
        "questions": [
            {
                "type": "choice",
                "instructions": "a",
                "choices": [{"value": True}, {"value": "b", "description": "c"}],
            }
        ],
        "trio": {"both_orders": True},
    }
    _, (chat, asking, _) = parse_decisions(json.dumps(body).encode(), max_parts=9)
    prompt = read_prompt(chat, MediaReader(ServerSettings()), max_pixels=1)

    async def packed() -> bytes:
        return packed_request(AnswerJob(chat, prompt, asking))

    _, messages, arrived = unpacked_request(asyncio.run(packed()))
    assert (messages, arrived) == (prompt.messages, asking)


def test_a_request_travels_with_its_images_read() -> None:
    body = json.dumps({"model": "m", "messages": question("w1", image_url())}).encode()
    prompt = read_prompt(parse_chat(body, max_parts=9), MediaReader(ServerSettings()), max_pixels=10_000)
    chat, messages = travelled(prompt, temperature=0.5, stop=["a"], trio={"kept": True})
    assert messages == prompt.messages
    assert (chat.temperature, chat.stops, chat.trio.kept) == (0.5, ("a",), True)  # type: ignore[attr-defined]


def test_a_full_disk_refuses_a_video_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RequestError, match="expected room on the server's disk, got 'No space left") as info:
        Prompt([{"role": "user", "content": [{"type": "video", "video": b"frames"}]}])
    assert info.value.status == 503
    assert list(tmp_path.iterdir()) == []


def test_a_video_travels_as_bytes_and_becomes_a_file_again() -> None:
    video = {"type": "video", "video": b"frames", "fps": 2.0, "num_frames": None}
    prompt = Prompt([{"role": "user", "content": [video]}])
    _, messages = travelled(prompt)
    prompt.close()
    assert messages == [{"role": "user", "content": [video]}]
    arrived = Prompt(messages)
    path = arrived.messages[0]["content"][0]["video"]
    assert path.read_bytes() == b"frames"
    arrived.close()
    assert not path.exists()


@pytest.mark.parametrize(
    "event",
    [
        NewText("é"),
        Kept({"images": [{"boxes": [[0, 1.5, 2, 3]]}]}),
        Decided(3, [0.25, 0.75], 0.75, {"label_mass": 0.5}),
        Finished("stop", {"kept_tokens": [1, 2]}),
    ],
    ids=["text", "kept", "decided", "end"],
)
def test_an_event_arrives_equal(event: Event) -> None:
    assert unpacked_events(packed_events([event, event])) == [event, event]


def test_an_error_arrives_with_all_that_a_client_is_told() -> None:
    error = RequestError(429, "full", code="queue_full", param="model", retry_after_s=2.5)
    (arrived,) = unpacked_events(packed_events([Failed(error)]))
    assert isinstance(arrived, Failed)
    assert (arrived.error.status, arrived.error.body, arrived.error.headers) == (
        429,
        error.body,
        error.headers,
    )
