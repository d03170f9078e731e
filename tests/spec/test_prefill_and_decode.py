"""Decode continues a prefill exactly; buckets, padding and missing pictures change nothing."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.decoder import PrefillResult
from trio_edge.runtime.model.decoder_prompt import DecoderPrompt, write_prompt
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import build_messages
from trio_edge.runtime.prompts.tokenizer import plain_positions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPT = "w1 w2 w3 w4 w5"


@pytest.fixture(scope="module")
def keep_all(keep_all_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(keep_all_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reduced(reduced_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(reduced_bundle) as pipeline:
        yield pipeline


def first_logits(pipeline: Pipeline, *arguments: Any, **settings: Any) -> np.ndarray[Any, Any]:
    answer = pipeline.generate(*arguments, **settings)
    next(iter(answer), None)
    return answer.first_logits


@pytest.mark.parametrize("sizes", [(1,) * 8, (2, 2, 4), (3, 5), (8,), (7, 1)], ids=str)
def test_decode_equals_a_longer_prefill(sizes: tuple[int, ...], keep_all: Pipeline) -> None:
    """The logits after n decoded tokens are those of a prefill whose prompt ends with these tokens."""
    generator = np.random.default_rng(0)
    decoder, hidden = keep_all._level.decoder, keep_all.manifest.dimensions.hidden_size
    size, steps = keep_all.manifest.max_visual + 32, 8
    rows = generator.standard_normal((40 + steps, hidden)).astype(np.float32)

    def prefill(count: int) -> PrefillResult:
        return decoder.prefill(
            DecoderPrompt(
                text=np.concatenate([rows[:3], rows[23:count]]),
                visual=rows[3:23],
                visual_rows=np.arange(3, 23, dtype=np.int32),
                max_visual=size - 32,
                text_bucket=32,
                positions=plain_positions(num_rows=size, length=count),
            )
        )

    prefill(40)
    logits: list[Any] = []
    for count in sizes:
        first = 40 + len(logits)
        tops = decoder.decode(rows[first : first + count])
        logits += [decoder.logits(row) for row in range(len(tops))]
        assert [int(top.ids[np.argmax(top.logits)]) for top in tops] == [
            int(np.argmax(row)) for row in logits[-count:]
        ]
    for step, row in enumerate(logits, 41):
        np.testing.assert_allclose(row, prefill(step).logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("rows", [[-1, 3], [3, 3], [4, 3], [3, 8], [3]], ids=str)
def test_rows_that_do_not_fit_the_visual_tokens_are_refused(rows: list[int], keep_all: Pipeline) -> None:
    hidden, most = keep_all.manifest.dimensions.hidden_size, keep_all.manifest.max_visual
    prompt = DecoderPrompt(
        text=np.zeros((6, hidden), np.float32),
        visual=np.zeros((2, hidden), np.float32),
        visual_rows=np.array(rows, np.int32),
        max_visual=most,
        text_bucket=32,
        positions=plain_positions(num_rows=most + 32, length=8),
    )
    with pytest.raises(ShapeError, match="expected 2 ascending rows below 8"):
        prompt.rows(keep_all.manifest)


@pytest.mark.parametrize("kind", ["keep_all", "reduced"])
def test_every_bucket_gives_the_same_answer(kind: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(kind)
    picture = random_picture(60, 45)
    small, large = pipeline.manifest.text_buckets[0], pipeline.manifest.text_buckets[-1]
    ids = pipeline._encode(build_messages(PROMPT, images=[picture]))
    assert ids.num_tokens <= small < large
    prepared = pipeline._level.vision.prepare(picture, PROMPT)
    seen = pipeline._level.vision.encode_images([prepared], after=None, text_bucket=small)
    hidden = pipeline.manifest.dimensions.hidden_size
    results = []
    for bucket in (small, large):
        prompt = write_prompt(
            ids, seen, manifest=pipeline.manifest, embedding=pipeline._embedding, text_bucket=bucket
        )
        logits = [pipeline._level.decoder.prefill(prompt).logits]
        for _ in range(3):
            pipeline._level.decoder.decode(np.full((1, hidden), 0.1, np.float32))
            logits.append(pipeline._level.decoder.logits())
        results.append(np.stack(logits))
    np.testing.assert_allclose(results[0], results[1], **LOGITS_FLOAT32)


def test_text_only_equals_hugging_face(checkpoint: Path, keep_all: Pipeline) -> None:
    original = Original.load(checkpoint)
    tokens, logits = original.generate(None, original.render(PROMPT, has_image=False), num_tokens=12)
    answer = keep_all.generate(None, PROMPT, max_new_tokens=12)
    _ = answer.text
    assert answer.token_ids == tokens
    np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT32)


def test_text_only_is_the_same_with_reduction(keep_all: Pipeline, reduced: Pipeline) -> None:
    whole, less = keep_all.generate(None, PROMPT), reduced.generate(None, PROMPT)
    assert less.text == whole.text
    assert less.token_ids == whole.token_ids


def test_a_picture_smaller_than_every_stage_is_not_reduced(checkpoint: Path, keep_all: Pipeline) -> None:
    """A stage may keep all of the largest picture; smaller ones then pass whole."""
    schedule = Schedule(stages=(Stage(layer=1, keep=keep_all.manifest.max_visual),))
    with Pipeline.from_bundle(export(checkpoint, schedule=schedule)) as pipeline:
        for size in ((48, 48), (24, 24), (30, 70)):
            picture = random_picture(*size)
            whole, all_kept = keep_all.generate(picture, PROMPT), pipeline.generate(picture, PROMPT)
            assert all_kept.text == whole.text
            assert all_kept.statistics.kept_tokens == (whole.statistics.visual_tokens,)
            np.testing.assert_allclose(all_kept.first_logits, whole.first_logits, **LOGITS_FLOAT32)


def test_image_size_shapes_give_the_same_answer_as_the_general_ones(
    checkpoint: Path, reduced: Pipeline
) -> None:
    fixed = export(checkpoint, schedule=reduced.manifest.schedule, image_sizes=((40, 20), (24, 24)))
    with Pipeline.from_bundle(fixed) as pipeline:
        for width, height in ((40, 20), (24, 24), (48, 48)):
            picture = random_picture(width, height)
            ours, general = pipeline.generate(picture, PROMPT), reduced.generate(picture, PROMPT)
            assert ours.text == general.text
            assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in general.kept]
            np.testing.assert_allclose(ours.first_logits, general.first_logits, **LOGITS_FLOAT32)


def test_image_sizes_leave_no_visual_padding(checkpoint: Path, reduced: Pipeline) -> None:
    fixed = export(checkpoint, schedule=reduced.manifest.schedule, image_sizes=((40, 20), (24, 24)))
    with Pipeline.from_bundle(fixed) as pipeline:
        manifest = pipeline.manifest
        assert [size.num_visual for size in manifest.image_sizes] == [
            size.rows for size in manifest.image_sizes
        ]
        assert manifest.max_visual == reduced.manifest.max_visual
        for size in manifest.image_sizes:
            prepared = pipeline._level.vision.prepare(random_picture(size.width, size.height), PROMPT)
            assert len(prepared.inputs["token_index"]) == prepared.layout.num_visual == size.num_visual


def test_only_image_sizes_refuses_a_larger_picture(checkpoint: Path, reduced: Pipeline) -> None:
    fixed = export(
        checkpoint, schedule=reduced.manifest.schedule, image_sizes=((40, 20),), only_image_sizes=True
    )
    with Pipeline.from_bundle(fixed) as pipeline:
        assert pipeline.manifest.max_visual < reduced.manifest.max_visual
        with pytest.raises(ShapeError, match="export for this size, or without --only-image-sizes"):
            pipeline.generate(random_picture(48, 48), PROMPT)


def test_history_reaches_the_model(checkpoint: Path, keep_all: Pipeline) -> None:
    original, picture = Original.load(checkpoint), random_picture(48, 24)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1 w2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        {"role": "user", "content": [{"type": "text", "text": "w4 w5"}]},
    ]
    text = original.processor.apply_chat_template(messages, add_generation_prompt=True)
    pixels = keep_all._level.vision.prepare(picture, PROMPT).inputs["pixel_values"]
    tokens, _ = original.generate(picture, text, num_tokens=10, pixel_values=pixels)
    answer = keep_all.generate(picture, "w4 w5", history=[("w1 w2", "w3")], max_new_tokens=10)
    _ = answer.text
    assert answer.token_ids == tokens


def test_statistics_count_what_happened(reduced: Pipeline) -> None:
    answer = reduced.generate(random_picture(48, 48), PROMPT, max_new_tokens=5)
    _ = answer.text
    statistics = answer.statistics
    assert statistics.visual_tokens == 9 + 6 * 7
    assert statistics.kept_tokens == (14, 6)
    assert statistics.average_keep == pytest.approx((51 + 14 + 6) / (3 * 51))
    assert statistics.new_tokens == len(answer.token_ids) <= 5
    assert set(statistics.graph_ms) == {graph.name for graph in reduced.manifest.graphs}
    rows = [51 + statistics.text_tokens, 14 + statistics.text_tokens, 6 + statistics.text_tokens]
    decoded = statistics.new_tokens - 1
    assert statistics.kv_bytes == sum(2 * 2 * 16 * 4 * (count + decoded) for count in rows)


def test_kept_tokens_of_later_stages_are_among_those_of_earlier_ones(reduced: Pipeline) -> None:
    answer = reduced.generate(random_picture(48, 48), PROMPT, max_new_tokens=1)
    _ = answer.text
    first, second = (set(kept.tolist()) for kept in answer.kept)
    assert second < first
    assert answer.boxes.shape == (51, 4)


def test_a_seed_makes_sampling_repeatable(reduced: Pipeline) -> None:
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_new_tokens": 12}
    picture = random_picture(48, 24)
    texts = [reduced.generate(picture, PROMPT, **settings).text for _ in range(2)]
    assert texts[0] == texts[1]


def test_two_answers_at_once_are_refused(reduced: Pipeline) -> None:
    picture = random_picture(24, 24)
    first = iter(reduced.generate(picture, PROMPT, max_new_tokens=20, temperature=1.0, seed=1))
    next(first)
    next(iter(reduced.generate(picture, PROMPT, max_new_tokens=2)), None)
    with pytest.raises(ShapeError, match="one answer at a time"):
        list(first)


def test_float16_bundle_answers_like_float32(checkpoint: Path, keep_all: Pipeline) -> None:
    with Pipeline.from_bundle(export(checkpoint, dtype="float16")) as half:
        picture = random_picture(48, 48)
        np.testing.assert_allclose(
            first_logits(half, picture, PROMPT), first_logits(keep_all, picture, PROMPT), **LOGITS_FLOAT16
        )


def test_a_closed_pipeline_gives_its_memory_back_without_a_garbage_collection(reduced_bundle: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        with Pipeline.from_bundle(reduced_bundle) as pipeline:
            for _ in range(2):
                answer = pipeline.generate(random_picture(60, 45), PROMPT, max_new_tokens=4)
                assert answer.text is not None
                assert answer.statistics.new_tokens > 1
            decoder = weakref.ref(pipeline._level.decoder)
            memory = weakref.ref(pipeline._level.decoder._memory)
        del pipeline, answer
        assert (decoder(), memory()) == (None, None)
    finally:
        gc.enable()
