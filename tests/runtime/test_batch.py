"""Answers that decode together: each is the answer that it would be alone."""

from __future__ import annotations

import dataclasses
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from tests.bundles import INT8_CACHES, export
from tests.engine_bundles import build_here
from tests.interleaved import interleaved
from tests.pictures import random_picture
from trio_edge.export.options import ExportOptions, LevelRequest
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import ManifestError, ScheduleError, ShapeError
from trio_edge.runtime.bundle.manifest import MANIFEST_NAME
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.devices.memory import memory_plan
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.answer import Generation

PICTURES = [random_picture(30 + 9 * number, 48, seed=number) for number in range(4)]
PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w1 w2", "w3 w1"]
STAGES = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
SIZES = [2, 4, 8]
FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16": {"dtype": "float16"},
    "int4": {"quantize": parse_plan("all=int4")},
    "int8": {"quantize": parse_plan("all=int8")},
    "kv=int8": {"quantize": parse_plan("kv=int8"), "scales": INT8_CACHES},
    "follow-ups": {"follow_ups": True},
    "keep all": {"schedule": Schedule()},
    "preserved positions": {"schedule": msgspec.structs.replace(STAGES, positions="preserved")},
    "one row a step": {"decode_rows": 1},
}


@pytest.fixture(scope="module")
def batched(checkpoint: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(checkpoint, schedule=STAGES, batch=4)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> Iterator[Pipeline]:
    """The same bundle for one answer."""
    with Pipeline.from_bundle(export(checkpoint, schedule=STAGES)) as pipeline:
        yield pipeline


def ask(pipeline: Pipeline, number: int, **settings: Any) -> Generation:
    return pipeline.generate(PICTURES[number % 4], PROMPTS[number % 4], **settings)


def assert_same(answer: Generation, own: Generation) -> None:
    """``answer`` is what the pipeline of one answer gives, with its logs and its counts."""
    assert answer.text == own.text
    assert answer.token_ids == own.token_ids
    for one, other in zip(answer.logprobs, own.logprobs, strict=True):
        assert one.top_ids == other.top_ids
        assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
    assert [kept.tolist() for kept in answer.kept] == [kept.tolist() for kept in own.kept]
    assert answer.statistics.new_tokens == own.statistics.new_tokens
    assert answer.statistics.kv_bytes == own.statistics.kv_bytes
    assert len(answer.statistics.token_ms) == len(answer.token_ids) - 1
    assert answer.statistics.decode_ms == pytest.approx(sum(answer.statistics.token_ms))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMATS)
def test_answers_are_those_of_a_bundle_for_one(checkpoint: Path, form: str, size: int) -> None:
    how = {"schedule": STAGES, **FORMATS[form]}
    settings: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 5}
    if form != "float16":  # near ties may fall otherwise there
        settings["num_logprobs"] = 2
    with ExitStack() as stack:
        own, together = (
            stack.enter_context(
                Pipeline.from_bundle(export(checkpoint, batch=batch, **how), cpu_accuracy="float32")
            )
            for batch in (1, size)
        )
        answers = [ask(together, number, **settings) for number in range(size)]
        interleaved(answers)
        for number, answer in enumerate(answers):
            assert_same(answer, ask(own, number, **settings))


@pytest.mark.parametrize("lookup", [0, 7, "auto"])
@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 1.5, "seed": 3},
        {"repetition_penalty": 1.3, "num_logprobs": 1},
        {"temperature": 0.7, "top_k": 3, "seed": 1, "num_logprobs": 2},
        {"max_new_tokens": 1},
    ],
    ids=str,
)
def test_settings_belong_to_each_answer(
    how: dict[str, Any], lookup: Any, batched: Pipeline, alone: Pipeline
) -> None:
    plain: dict[str, Any] = {"max_new_tokens": 12}
    answers = [ask(batched, number, lookup=lookup, **(how if number % 2 else plain)) for number in range(4)]
    interleaved(answers)
    for number, answer in enumerate(answers):
        assert_same(answer, ask(alone, number, **(how if number % 2 else plain)))


def test_a_step_is_shared_and_an_answer_alone_has_its_own(batched: Pipeline) -> None:
    batch = batched._level.batch
    assert batch is not None
    answers = [ask(batched, number, max_new_tokens=10, min_new_tokens=10) for number in range(4)]
    readers = [iter(answer) for answer in answers]
    for reader in readers:
        next(reader)
    assert not batch.has_room or len(batched._answers._running) == 4
    assert all(answer.statistics.steps <= 2 for answer in answers)
    interleaved(answers)
    assert {answer.statistics.steps for answer in answers} == {9}
    last = ask(batched, 0, max_new_tokens=10, lookup=0)
    assert last.text is not None
    assert batched._answers._running[-1].seat is None


def test_answers_come_and_go_at_any_time(batched: Pipeline, alone: Pipeline) -> None:
    lengths = [3, 9, 5, 12, 2, 7, 1, 8]
    waiting = list(enumerate(lengths))
    running: dict[int, Iterator[str]] = {}
    done: dict[int, Generation] = {}
    while waiting or running:
        if waiting and len(running) < 4:
            number, length = waiting.pop(0)
            done[number] = ask(batched, number, max_new_tokens=length, min_new_tokens=length)
            running[number] = iter(done[number])
        for number, reader in list(running.items()):
            if next(reader, None) is None:
                del running[number]
    for number, length in enumerate(lengths):
        assert_same(done[number], ask(alone, number, max_new_tokens=length, min_new_tokens=length))
    assert len(batched._levels["default"].batch._free) >= 3  # type: ignore[union-attr]


def test_a_reader_that_pauses_holds_nobody_up(batched: Pipeline, alone: Pipeline) -> None:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12}
    slow, fast = (ask(batched, number, **settings) for number in (0, 1))
    reader = iter(slow)
    next(reader)
    assert fast.text == ask(alone, 1, **settings).text
    assert slow.statistics.steps <= 2
    assert_same(slow, ask(alone, 0, **settings))


@pytest.mark.parametrize("end", ["cancel", "drop", "close"])
def test_an_answer_that_nobody_wants_gives_its_place_back(
    batched: Pipeline, alone: Pipeline, end: str
) -> None:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    for _ in range(6):
        answers = [ask(batched, number, **settings) for number in range(4)]
        readers = [iter(answer) for answer in answers]
        for reader in readers:
            next(reader)
        if end == "cancel":
            for answer in answers[:3]:
                answer.cancel()
            assert all(answer.text is not None for answer in answers[:3])
        elif end == "close":
            for answer in answers[:3]:
                answer._steps.close()  # type: ignore[attr-defined]
        else:
            del readers, answers[:3], reader
            gc.collect()
        assert_same(answers[-1], ask(alone, 3, **settings))
    interleaved([ask(batched, number, **settings) for number in range(4)])


def test_one_more_than_fit_ends_the_oldest(batched: Pipeline, alone: Pipeline) -> None:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    answers = [ask(batched, number, **settings) for number in range(5)]
    for answer in answers:
        next(iter(answer))
    with pytest.raises(ShapeError, match="at most 4 answers at a time, at one level, another was started"):
        _ = answers[0].text
    interleaved(answers[1:])
    for number, answer in enumerate(answers[1:], 1):
        assert_same(answer, ask(alone, number, **settings))


def test_questions_in_between_change_nothing(batched: Pipeline, alone: Pipeline) -> None:
    """Prefills and token times use the decoder's own caches, which the answers have left."""
    settings = {"max_new_tokens": 10, "min_new_tokens": 10}
    answers = [ask(batched, number, **settings) for number in range(3)]
    readers = [iter(answer) for answer in answers]
    for reader in readers:
        next(reader)
    assert ask(batched, 3, max_new_tokens=1).text is not None
    assert len(batched.time_tokens(3)) == 3
    interleaved(answers)
    for number, answer in enumerate(answers):
        assert_same(answer, ask(alone, number, **settings))


def test_threads_may_read_at_once(batched: Pipeline, alone: Pipeline) -> None:
    settings = {"max_new_tokens": 10, "min_new_tokens": 10, "temperature": 1.0}
    start = threading.Barrier(4)

    def read(number: int) -> Generation:
        answer = ask(batched, number, seed=number, **settings)
        start.wait()
        assert answer.text is not None
        return answer

    for _ in range(4):
        with ThreadPoolExecutor(4) as threads:
            answers = list(threads.map(read, range(4)))
        for number, answer in enumerate(answers):
            assert_same(answer, ask(alone, number, seed=number, **settings))


class Nothing:
    """Allows a few tokens, and then none."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def allowed(self) -> NDArray[np.bool_]:
        return np.full(self.size, self.count > 0)

    def add(self, _token: int) -> None:
        self.count -= 1


def test_rules_that_fail_belong_to_their_answer(batched: Pipeline, alone: Pipeline) -> None:
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    rules = Nothing(3, batched.manifest.token_embedding.shape[0])
    bad = ask(batched, 0, max_new_tokens=8, constraint=rules)
    good = ask(batched, 1, **settings)
    readers = iter(bad), iter(good)
    with pytest.raises(ShapeError, match="at least one token that may come next"):
        for _ in range(8):
            for reader in readers:
                next(reader)
    assert_same(good, ask(alone, 1, **settings))


def test_levels_do_not_mix(checkpoint: Path) -> None:
    levels = LevelRequest("quick", STAGES), LevelRequest("full", Schedule())
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    with Pipeline.from_bundle(export(checkpoint, levels=levels, batch=2)) as pipeline:
        for level in ("quick", "full", "quick"):
            answers = [ask(pipeline, number, level=level, **settings) for number in range(2)]
            texts = interleaved(answers)
            for number, text in enumerate(texts):
                assert text == ask(pipeline, number, level=level, **settings).text
        quick, full = (ask(pipeline, 0, level=level, **settings) for level in ("quick", "full"))
        next(iter(quick))
        assert full.text is not None
        with pytest.raises(ShapeError, match="at one level, another was started"):
            _ = quick.text


@pytest.mark.parametrize("batch", [0, 3, 16])
def test_other_sizes_are_refused(batch: int, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=f"--batch: expected one of 1, 2, 4, 8, got {batch}; choose one"):
        ExportOptions(model="tiny", out=tmp_path, batch=batch)


def test_the_manifest_counts_the_caches_of_all_answers(checkpoint: Path) -> None:
    one, four = (open_bundle(export(checkpoint, schedule=STAGES, batch=batch)).manifest for batch in (1, 4))
    assert (one.batch, four.batch) == (1, 4)
    assert four.kv_bytes == 5 * one.kv_bytes
    assert memory_plan(four).num_bytes - memory_plan(one).num_bytes >= 4 * one.kv_bytes


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ('"slots.prefix[0]"', '"cache.prefix[0]"', "expected"),
        ('"batch.past_length.0"', '"step.past_length.0"', "expected"),
        ('"batch.embeds"', '"step.embeds"', "expected"),
        ('{\n     "B": 4\n    }', '{\n     "B": 2\n    }', "expected"),
        ('{\n     "B": 4\n    }', '{\n     "B": 1\n    }', "expected"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(
    checkpoint: Path, tmp_path: Path, old: str, new: str, wanted: str
) -> None:
    bundle = export(checkpoint, tmp_path / "bundle", schedule=STAGES, batch=4)
    text = (bundle / MANIFEST_NAME).read_text()
    assert old in text
    (bundle / MANIFEST_NAME).write_text(text.replace(old, new))
    with pytest.raises(ManifestError, match=wanted):
        open_bundle(bundle)


@pytest.mark.parametrize("form", ["float16", "int8", "kv=int8"])
def test_engines_of_a_batch_are_built(checkpoint: Path, tmp_path: Path, form: str) -> None:
    """tensorrt-rtx builds every layer range with a prefill's profile and the batch's."""
    bundle = open_bundle(export(checkpoint, batch=4, **{"schedule": STAGES, **FORMATS[form]}))
    manifest = bundle.manifest
    ranges = {graph.name for graph in manifest.ranges}
    graphs = tuple(
        graph.at_profiles([graph.profiles[0].name, "batch"]) if graph.name in ranges else graph
        for graph in manifest.graphs
    )
    bundle = dataclasses.replace(bundle, manifest=msgspec.structs.replace(manifest, graphs=graphs))
    sizes = build_here(bundle, tmp_path, graphs=ranges)
    assert sizes.keys() == ranges
    assert min(sizes.values()) > 0
