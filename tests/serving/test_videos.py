"""Videos in a request, as far as the bundle takes them."""

from __future__ import annotations

import base64
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest

from tests.bundles import export
from tests.qwen_checkpoints import CAMERA, save_qwen_checkpoint
from tests.serving.server import RunningServer, image_url, running, until
from tests.videos import write_video
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator

REDUCED = Schedule(positions="preserved", stages=(Stage(layer=1, keep=25), Stage(layer=2, keep=9)))
TEXT = {"type": "text", "text": "w1 w2"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_qwen_checkpoint(tmp_path_factory.mktemp("qwen") / "ck")
    return export(folder, schedule=REDUCED, max_frames=8, max_text=128)


@pytest.fixture(scope="module")
def qwen(bundle: Path) -> Iterator[RunningServer]:
    with running({"qwen": partial(Pipeline.from_bundle, bundle)}) as server:
        yield server


def ask(server: RunningServer, url: str, **settings: Any) -> Any:
    content = [{"type": "video_url", "video_url": {"url": url, **settings}}, TEXT]
    messages: Any = [{"role": "user", "content": content}]
    return server.client().chat.completions.create(
        model=next(iter(server.workers)), messages=messages, extra_body={"trio": {"kept": True}}
    )


@pytest.fixture
def server_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where the server, a thread of this process, puts what it needs for an answer."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_answer_about_a_video_is_the_pipelines_own(
    qwen: RunningServer, bundle: Path, tmp_path: Path, server_files: Path
) -> None:
    file = write_video(tmp_path / "clip.mp4", 5, size=CAMERA)
    url = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    with Pipeline.from_bundle(bundle) as pipeline:
        own = pipeline.generate(None, "w1 w2", video=file, num_frames=4)
        text = own.text
    answer = ask(qwen, url, num_frames=4)
    assert answer.choices[0].message.content == text
    assert answer.usage.visual_tokens == own.statistics.visual_tokens
    assert [len(image["stages"]) for image in answer.trio["images"]] == [3, 3]  # one for each pair of frames
    until(lambda: list(server_files.iterdir()) == [])  # the answer is sent first


def test_a_broken_video_is_refused_and_leaves_no_file(qwen: RunningServer, server_files: Path) -> None:
    with pytest.raises(openai.BadRequestError, match="video") as raised:
        ask(qwen, "data:video/mp4;base64,AAAA")
    assert "/tmp" not in str(raised.value)
    until(lambda: list(server_files.iterdir()) == [])


def test_an_image_is_no_video(qwen: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="a data URL of the type video"):
        ask(qwen, image_url())


def test_a_bundle_that_takes_no_videos_says_so(server: RunningServer, tmp_path: Path) -> None:
    file = write_video(tmp_path / "clip.mp4", 5, size=CAMERA)
    with pytest.raises(openai.BadRequestError, match="expected a model that takes videos"):
        ask(server, f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}")
