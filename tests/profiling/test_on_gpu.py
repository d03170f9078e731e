"""Profiling on a GPU, simulated (tests/cuda_on_host.py): it adds events around launches, and no wait."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cuda_on_host import CudaOnHost, pretend_gpu, write_engines
from tests.engine_bundles import HOST, copy_bundle
from trio_edge.profiling.measure import measuring
from trio_edge.profiling.measure.answers import LoadedBundle, RunQuestion, without_stop_tokens
from trio_edge.profiling.measure.measuring import measured_sizes, random_image, time_contexts
from trio_edge.runtime.backends.registry import make_backend
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.profiling.measure.answers import Answer

CHAIN = [
    "vision", "prefix",
    "segment_1", "head", "segment_1", "select_1", "segment_1",
    "suffix", "head", "suffix", "select_2", "suffix", "head",
]  # fmt: skip
"""Each probe runs forwards, through the head and back."""
STEP = ["prefix", "segment_1", "suffix", "head"]
WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize")
NEW_TOKENS = 5


@pytest.fixture
def cuda(reduced_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaOnHost:
    write_engines(copy_bundle(reduced_bundle, tmp_path / "bundle"), host=HOST)
    cuda = CudaOnHost()
    pretend_gpu(monkeypatch, cuda, HOST)
    return cuda


def answer(folder: Path, cuda: CudaOnHost, *, capture: bool) -> tuple[LoadedBundle, Answer, int]:
    """Return an answer's bundle, the answer, and how often the host waited for it."""
    bundle = open_bundle(folder / "bundle")
    loaded = LoadedBundle(bundle.folder, make_backend("tensorrt", bundle=bundle), capture=capture)
    cuda.calls.clear()
    given = loaded.answer(question_for(loaded.pipeline))
    waits = num_waits(cuda)
    loaded.close()
    return loaded, given, waits


def question_for(pipeline: Pipeline) -> RunQuestion:
    image = random_image(measured_sizes(pipeline)[0])
    return RunQuestion(image=image, prompt="w1 w2", new_tokens=NEW_TOKENS)


def num_waits(cuda: CudaOnHost) -> int:
    return sum(call[0] in WAITS for call in cuda.calls)


def test_every_launch_stands_between_two_events(cuda: CudaOnHost, tmp_path: Path) -> None:
    loaded, given, _ = answer(tmp_path, cuda, capture=False)
    assert [call.graph for call in given.calls] == CHAIN + STEP * (NEW_TOKENS - 1)
    assert not loaded.recording.captured
    assert all(call.milliseconds > 0 for call in given.calls)
    starts = [call.start for call in given.calls]
    assert starts == sorted(starts)
    assert given.start < given.calls[0].start < given.token_moments[0]
    assert given.host_token_ms is not None


def test_captured_steps_are_not_timed_one_by_one(cuda: CudaOnHost, tmp_path: Path) -> None:
    loaded, given, _ = answer(tmp_path, cuda, capture=True)
    assert [call.graph for call in given.calls] == CHAIN
    assert loaded.recording.captured
    assert given.host_token_ms is None
    assert len(given.token_ms) == NEW_TOKENS - 1


@pytest.mark.parametrize("capture", [False, True])
def test_profiling_waits_no_more_often(capture: bool, cuda: CudaOnHost, tmp_path: Path) -> None:
    _, given, waits = answer(tmp_path, cuda, capture=capture)
    bundle = open_bundle(tmp_path / "bundle")
    with Pipeline(without_stop_tokens(bundle), make_backend("tensorrt", bundle=bundle)) as plain:
        question = question_for(plain)
        cuda.calls.clear()
        expected = plain.generate(question.image, question.prompt, max_new_tokens=NEW_TOKENS)
        assert expected.text is not None
        assert waits == num_waits(cuda)
    assert given.token_ids == expected.token_ids


def test_tokens_at_all_contexts_are_captured_steps(
    cuda: CudaOnHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 1)
    bundle = open_bundle(tmp_path / "bundle")
    loaded = LoadedBundle(bundle.folder, make_backend("tensorrt", bundle=bundle))
    question = question_for(loaded.pipeline)
    (timed,) = time_contexts([loaded], question, seconds=1.0)
    assert len(timed) == 1 + measuring.POINTS
    assert all(one.milliseconds[0] > 0 for one in timed)
    assert loaded.recording.captured
    assert loaded.recording.take() == []  # no events between the launches of a step
    loaded.close()
