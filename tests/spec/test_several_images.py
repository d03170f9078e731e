"""Prompts with several images, between and after text: keep-all equals Hugging Face, reduced equals plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.decode_logits import record_logits
from tests.engine_bundles import build_here
from tests.interleaved import interleaved
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen_checkpoint
from tests.several_images import CONVERSATIONS, MAX_IMAGES, PRODUCT
from tests.spec.conftest import STAGES
from tests.spec.reduced_reference import entering_the_decoder, reduced_logits, reduced_rows
from tests.spec.test_selectors_through_bundles import rows_after
from tests.spec.whole_answers import NUM_STEPS, generate
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.options import LevelRequest
from trio_edge.runtime.bundle.errors import ImageError, ScheduleError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.spec.conftest import Subject


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_keep_all_gives_the_tokens_of_hugging_face(
    subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, logits = generate(subject.model, subject.inputs(name))
    seen = record_logits(subject.keep_all, monkeypatch)
    answer = subject.keep_all.chat(CONVERSATIONS[name], max_new_tokens=NUM_STEPS)
    assert answer.text is not None
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_that_are_decoded_together_give_the_logits_of_one_by_one(
    subject: Subject, name: str, rows: int
) -> None:
    for pipeline in (subject.keep_all, subject.reduced):
        decoder, tokens = pipeline._level.decoder, [*range(5, 5 + rows)]
        if pipeline.manifest.dimensions.linear is not None:
            assert decoder.max_rows == 1, "a state cannot take back a wrong draft"
            continue
        found = []
        for size in (1, rows):
            assert pipeline.chat(CONVERSATIONS[name], max_new_tokens=1).text is not None
            logits = []
            for first in range(0, rows, size):
                tops = decoder.decode(pipeline._embedding[tokens[first : first + size]])
                logits += [decoder.logits(row) for row in range(len(tops))]
            found.append(np.stack(logits))
        np.testing.assert_allclose(*found, **LOGITS_FLOAT32)


@pytest.fixture(scope="module")
def several(subject: Subject) -> Iterator[Pipeline]:
    """Both levels in one bundle, for several answers, with hidden states."""
    schedules = {"reduced": subject.reduced, "full": subject.keep_all}
    levels = tuple(LevelRequest(name, own.manifest.schedule) for name, own in schedules.items())
    options: dict[str, Any] = {"max_images": MAX_IMAGES, **dict(subject.family.options)}
    bundle = export(subject.folder, levels=levels, batch=4, outputs="hidden", **options)
    with Pipeline.from_bundle(bundle) as pipeline:
        yield pipeline


@pytest.mark.parametrize("level", ["reduced", "full"])
def test_answers_that_decode_together_are_each_ones_own(
    subject: Subject, several: Pipeline, level: str
) -> None:
    """Prompts of several numbers of images in one batch."""
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "num_logprobs": 2}
    answers = [several.chat(one, level=level, **settings) for one in CONVERSATIONS.values()]
    texts = interleaved(answers)
    own = subject.reduced if level == "reduced" else subject.keep_all
    for conversation, answer, text in zip(CONVERSATIONS.values(), answers, texts, strict=True):
        alone = own.chat(conversation, **settings)
        assert (text, answer.token_ids) == (alone.text, alone.token_ids)
        for one, other in zip(answer.logprobs, alone.logprobs, strict=True):
            assert one.chosen == pytest.approx(other.chosen, abs=1e-4)
            assert one.top == pytest.approx(other.top, abs=1e-4)


@pytest.mark.parametrize("level", ["reduced", "full"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_hidden_states_are_those_of_hugging_face_and_of_plain_torch(
    subject: Subject, several: Pipeline, name: str, level: str
) -> None:
    inputs, schedule = subject.inputs(name), several.level_named(level).manifest.schedule
    entering = entering_the_decoder(subject.model, inputs)
    spots = inputs["input_ids"][0] == several.manifest.text.image_token_id
    positions = entering["position_ids"]
    rows = reduced_rows(
        subject.model,
        entering["inputs_embeds"],
        schedule,
        visual=spots.nonzero()[:, 0].tolist(),
        positions=positions[-3:] if subject.family.positions == "preserved" else None,
        planes=entering.get("deepstack_visual_embeds") or (),
    )
    found = several.hidden_states_of(CONVERSATIONS[name], level=level)
    np.testing.assert_allclose(found.values, rows.values.numpy(), **LOGITS_FLOAT32)
    np.testing.assert_array_equal(found.positions, rows.positions.numpy())
    assert found.visual_rows.tolist() == rows.visual
    assert found.kept.tolist() == (rows.kept[-1] if rows.kept else [*range(int(spots.sum()))])
    if level == "full":
        with torch.no_grad():
            whole = subject.model.model(**inputs).last_hidden_state[0]
        np.testing.assert_allclose(found.values, whole.numpy(), **LOGITS_FLOAT32)


@pytest.mark.parametrize("name", PRODUCT)
def test_every_number_of_images_of_every_shape_gives_the_logits_of_hugging_face(
    subject: Subject, name: str
) -> None:
    """The inputs are the original processor's: its tokens, and its pixels for as many images as there are."""
    inputs = subject.inputs(name)
    answer = subject.keep_all.chat(PRODUCT[name], max_new_tokens=1)
    assert answer.text is not None
    image_id = subject.keep_all.manifest.text.image_token_id
    assert len(answer.boxes) == (inputs["input_ids"] == image_id).sum()
    _, logits = generate(subject.model, inputs, num_steps=1)
    np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT32)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_reduced_bundle_equals_plain_torch(subject: Subject, name: str) -> None:
    """One budget for all images: text between them stays, kept tokens keep their order."""
    inputs = subject.inputs(name)
    entering = entering_the_decoder(subject.model, inputs)
    spots = inputs["input_ids"][0] == subject.reduced.manifest.text.image_token_id
    positions = entering["position_ids"] if subject.family.positions == "preserved" else None
    logits, kept = reduced_logits(
        subject.model,
        entering["inputs_embeds"],
        subject.reduced.manifest.schedule,
        visual=spots.nonzero()[:, 0].tolist(),
        positions=None if positions is None else positions[-3:],
        planes=entering.get("deepstack_visual_embeds") or (),
    )
    answer = subject.reduced.chat(CONVERSATIONS[name], max_new_tokens=3)
    assert answer.text is not None
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
    assert answer.statistics.visual_tokens == int(spots.sum()) == len(answer.boxes)


def test_a_selection_before_the_decoder_is_each_images_own(subject: Subject) -> None:
    """A token stays in the run that it comes from, whatever is kept of the others."""
    name, everything = "an image in each turn", Schedule(positions=subject.family.positions)
    options = {"max_images": 2, "token_method": "divprune", "token_keep": 7, **dict(subject.family.options)}
    with Pipeline.from_bundle(export(subject.folder, schedule=everything, **options)) as pipeline:
        inputs = subject.inputs(name)
        answer = pipeline.chat(CONVERSATIONS[name], max_new_tokens=3)
        assert answer.text is not None
        each = pipeline._level.vision._layouts
    kept: list[int] = []
    first = 0
    for layout, of_image in each:
        kept += (first + of_image["reduce"][: layout.num_visual]).tolist()
        first += layout.num_visual
    assert len(kept) == min(14, first) == len(answer.boxes)
    entering = entering_the_decoder(subject.model, inputs)
    spots = inputs["input_ids"][0] == pipeline.manifest.text.image_token_id
    rows, visual = rows_after(kept, spots.nonzero()[:, 0].tolist(), len(spots))
    positions = entering["position_ids"] if subject.family.positions == "preserved" else None
    logits, _ = reduced_logits(
        subject.model,
        entering["inputs_embeds"][:, rows],
        everything,
        visual=visual,
        positions=None if positions is None else positions[-3:, :, rows],
        planes=[plane[kept] for plane in entering.get("deepstack_visual_embeds") or ()],
    )
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_a_bundle_for_one_image_takes_several_that_fit(tmp_path: Path) -> None:
    """Room is counted in tokens: two small images may take that of a large one."""
    folder = save_qwen_checkpoint(tmp_path / "ck")
    schedule = Schedule(positions="preserved")
    small = random_picture(56, 56)
    with (
        Pipeline.from_bundle(export(folder, schedule=schedule)) as one,
        Pipeline.from_bundle(export(folder, schedule=schedule, max_images=4)) as several,
    ):
        asked = [pipeline.generate([small, small], "w1 w2", max_new_tokens=4) for pipeline in (one, several)]
        assert asked[0].text == asked[1].text
        np.testing.assert_allclose(asked[0].first_logits, asked[1].first_logits, **LOGITS_FLOAT32)
        large = random_picture(150, 100)
        with pytest.raises(
            ShapeError, match=r"images: expected at most \d+ visual tokens in all .* got \d+ for 16 images"
        ):
            several.generate([large] * 16, "w1")


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_lost(subject: Subject) -> None:
    before = subject.keep_all.generate(random_picture(40, 40), "w1", max_new_tokens=3)
    text = before.text
    with pytest.raises(ImageError, match="nothing-here"):
        subject.keep_all.generate([random_picture(40, 40), "nothing-here.png"], "w1")
    assert subject.keep_all.generate([random_picture(40, 40)], "w1", max_new_tokens=3).text == text


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of turns"),
        ("w1", "expected a list of turns"),
        ([{"role": "user"}], r"messages\[0\]: expected text or a list of parts as content, got NoneType"),
        ([{"content": "w1"}], r"messages\[0\]: expected a dict with 'role' and 'content'"),
        ([{"role": "user", "content": [{"type": "sound"}]}], "expected parts of the type 'text', 'image' or 'video', got 'sound'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "expected 'image' in a part of the type 'image', got none"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "expected text in a part"),
        ([{"role": "assistant", "content": "w1"}], "expected the last turn to be the user's, got 'assistant'"),
    ],
)  # fmt: skip
def test_messages_that_are_none_are_one_line(keep_all_bundle: Path, messages: Any, message: str) -> None:
    with Pipeline.from_bundle(keep_all_bundle) as pipeline, pytest.raises(ShapeError, match=message):
        pipeline.chat(messages)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("shares") / "ck")


BY_IMAGE = Schedule(stages=STAGES, budget="image", nms_threshold=0.1, nms_rounds=64)
PAIR = [random_picture(60, 45, seed=seed) for seed in (1, 2)]


def _kept(folder: Path, schedule: Schedule) -> tuple[list[list[int]], int]:
    """Return what each stage keeps of two pictures in a bundle for three, and the stages that the host redid."""
    with Pipeline.from_bundle(export(folder, schedule=schedule, max_images=3)) as pipeline:
        answer = pipeline.generate(PAIR, "w1 w2 w3", max_new_tokens=2)
        assert answer.text is not None
        first = len(answer.layouts[0].boxes)
        if schedule.budget == "image":
            for indices, stage in zip(answer.kept, STAGES):
                assert len(indices) == stage.keep
                assert min((indices < first).sum(), (indices >= first).sum()) >= stage.keep // 3
        return [indices.tolist() for indices in answer.kept], answer.statistics.repaired_stages


@pytest.mark.parametrize("method", ["trio", "fastv", "pyramiddrop"])
def test_each_image_keeps_its_share(method: str, llava: Path) -> None:
    """Shares that images with fewer tokens leave go to the best of the others."""
    _kept(llava, msgspec.structs.replace(BY_IMAGE, method=method))


def test_the_hosts_exact_nms_keeps_the_shares_too(llava: Path) -> None:
    kept, num_repaired = _kept(llava, msgspec.structs.replace(BY_IMAGE, nms_rounds=1))
    assert num_repaired > 0
    assert (kept, 0) == _kept(llava, BY_IMAGE)


def test_tensorrt_builds_every_graph(llava: Path, tmp_path: Path) -> None:
    """Rows with marks, shares of images, and a first range with follow-ups."""
    bundle = export(llava, schedule=BY_IMAGE, max_images=3, follow_ups=True)
    assert set(build_here(open_bundle(bundle), tmp_path)) == {
        graph.name for graph in open_bundle(bundle).manifest.graphs
    }


def test_a_method_without_shares_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "ck")
    for schedule, images in (
        (Schedule(stages=STAGES, method="dart", budget="image"), 2),
        (Schedule(stages=STAGES, budget="image"), 12),
    ):
        with pytest.raises(
            ScheduleError, match="--budget image: expected --method trio or fastv or pyramiddrop"
        ):
            export(folder, schedule=schedule, max_images=images)
