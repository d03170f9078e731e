"""What profiling adds on a GPU, on one that is none (tests/cuda_on_host.py): events around launches, and no wait."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest

from tests.cuda_on_host import CudaOnHost, pretend_gpu, write_engines
from tests.engine_bundles import HOST, copy_bundle
from trio_edge.profiling.measure import contexts
from trio_edge.profiling.measure.answers import Question, Subject
from trio_edge.profiling.measure.contexts import time_contexts
from trio_edge.profiling.page.pictures import picture_sizes, random_picture
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.profiling.measure.answers import Answer

CHAIN = ["vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head"]
STEP = ["prefix", "segment_1", "suffix", "head"]
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize")
NEW_TOKENS = 5


@pytest.fixture
def cuda(reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaOnHost:
    write_engines(copy_bundle(reduced_bundle, tmp_path / "bundle"), host=HOST)
    cuda = CudaOnHost()
    pretend_gpu(monkeypatch, cuda, HOST)
    return cuda


def answer(
    folder: Path, cuda: CudaOnHost, *, capture: bool, enabled: bool = True
) -> tuple[Subject, Answer, int]:
    """Return an answer's subject, the answer, and how often the host waited for it."""
    bundle = open_bundle(folder / "bundle")
    subject = Subject(bundle.folder, make_backend("tensorrt", bundle=bundle), capture=capture)
    question = Question(
        picture=random_picture(picture_sizes(subject.pipeline)[0]), prompt="w1 w2", new_tokens=NEW_TOKENS
    )
    cuda.calls.clear()
    with nullcontext() if enabled else subject.recording.paused():
        given = subject.answer(question)
    waits = sum(call[0] in WAITS for call in cuda.calls)
    subject.close()
    return subject, given, waits


def test_every_launch_stands_between_two_events(cuda: CudaOnHost, tmp_path: Path) -> None:
    subject, given, _ = answer(tmp_path, cuda, capture=False)
    assert [call.graph for call in given.calls] == CHAIN + STEP * (NEW_TOKENS - 1)
    assert not subject.recording.captured
    assert all(call.milliseconds > 0 for call in given.calls)
    starts = [call.start_ms for call in given.calls]
    assert starts == sorted(starts)
    assert given.start < given.first_launch < given.token_moments[0]
    assert given.host_token_ms is not None


def test_captured_steps_are_not_timed_one_by_one(cuda: CudaOnHost, tmp_path: Path) -> None:
    subject, given, _ = answer(tmp_path, cuda, capture=True)
    assert [call.graph for call in given.calls] == CHAIN
    assert subject.recording.captured
    assert given.host_token_ms is None
    assert len(given.token_ms) == NEW_TOKENS - 1


def test_profiling_waits_no_more_often(cuda: CudaOnHost, tmp_path: Path) -> None:
    _, given, waits = answer(tmp_path, cuda, capture=False)
    _, plain, waits_without = answer(tmp_path, cuda, capture=False, enabled=False)
    assert waits == waits_without
    assert given.token_ids == plain.token_ids
    assert not plain.calls


def test_tokens_at_all_contexts_are_captured_steps(
    cuda: CudaOnHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "ROUNDS", 1)
    bundle = open_bundle(tmp_path / "bundle")
    subject = Subject(bundle.folder, make_backend("tensorrt", bundle=bundle))
    question = Question(
        picture=random_picture(picture_sizes(subject.pipeline)[0]), prompt="w1 w2", new_tokens=NEW_TOKENS
    )
    (timed,) = time_contexts([subject], question, seconds=1.0)
    assert len(timed) == 1 + contexts.POINTS
    assert all(one.milliseconds[0] > 0 for one in timed)
    assert subject.recording.captured
    assert subject.recording.take() == []  # no events between the launches of a step
    subject.close()
