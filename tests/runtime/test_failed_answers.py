"""An answer that failed raises again, however and however often it is read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.pictures import random_picture
from trio_edge.runtime.answer import Generation
from trio_edge.runtime.bundle.errors import BackendError, ShapeError, TrioEdgeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE = random_picture(48, 48)


@pytest.fixture
def pipeline(reduced_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        yield pipeline


def _close(pipeline: Pipeline, _monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.close()


def _ask_another(pipeline: Pipeline, _monkeypatch: pytest.MonkeyPatch) -> None:
    next(iter(pipeline.generate(IMAGE, "w2")))


def _raise(error: BaseException) -> Callable[[Pipeline, pytest.MonkeyPatch], None]:
    def fail(*_: object, **__: object) -> None:
        raise error

    def arrange(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("prefill", "decode"):
            monkeypatch.setattr(pipeline._level.decoder, name, fail, raising=False)

    return arrange


CAUSES = {
    "closed": (_close, BackendError, "got a closed one"),
    "a graph": (
        _raise(BackendError("suffix: onnxruntime failed: no")),
        BackendError,
        "suffix: onnxruntime failed",
    ),
    "our own error": (_raise(ShapeError("decode: expected less")), ShapeError, "decode: expected less"),
    "any error": (
        _raise(ZeroDivisionError("by zero")),
        BackendError,
        "ended with ZeroDivisionError: by zero",
    ),
    "interrupted": (_raise(KeyboardInterrupt()), BackendError, "ended with KeyboardInterrupt"),
}


@pytest.mark.parametrize(
    ("cause", "read_before"),
    # Another answer ends only one that has begun.
    [*((cause, read_before) for cause in CAUSES for read_before in (0, 2)), ("another", 2)],
)
def test_a_failed_answer_raises_again(
    cause: str, read_before: int, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrange, kind, message = CAUSES.get(cause, (_ask_another, ShapeError, "another was started"))
    answer = pipeline.generate(IMAGE, "w1", temperature=0.0)
    stream = iter(answer)
    pieces = [next(stream) for _ in range(read_before)]
    arrange(pipeline, monkeypatch)
    with pytest.raises((TrioEdgeError, ZeroDivisionError, KeyboardInterrupt)):
        _ = answer.text
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(kind, match=message):
            _ = answer.text
        got: list[str] = []
        with pytest.raises(kind, match=message):
            got.extend(answer)
    stream = iter(answer)
    assert [next(stream) for _ in range(read_before)] == pieces


def test_a_whole_answer_outlives_its_pipeline(pipeline: Pipeline) -> None:
    answer = pipeline.generate(IMAGE, "w1")
    text = answer.text
    pipeline.close()
    assert answer.text == text == "".join(answer)


def test_a_second_thread_on_one_answer_is_one_error_line() -> None:
    is_running, may_end = threading.Event(), threading.Event()

    def steps(_answer: Generation) -> Iterator[str]:
        yield "one "
        is_running.set()
        assert may_end.wait(60)
        yield "two"

    answer, texts = Generation(steps), list[str]()
    reader = threading.Thread(target=lambda: texts.append(answer.text))
    reader.start()
    assert is_running.wait(60)
    with pytest.raises(
        ShapeError, match="expected one thread that reads it, got a second one; use one thread"
    ):
        _ = answer.text
    may_end.set()
    reader.join()
    assert texts == [answer.text] == ["one two"]


def test_two_readers_in_turns_get_all_pieces() -> None:
    answer = Generation(lambda _answer: iter(["a", "b", "c"]))
    first, second = iter(answer), iter(answer)
    assert [next(first), next(second), next(second), next(first), next(first), next(second)] == [*"aabbcc"]
    assert answer.text == "abc"
