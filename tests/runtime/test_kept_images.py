"""A further question about an image that was kept: the same answer bit for bit, and the vision graph does not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.lfm2_checkpoints import save_lfm2_vl_checkpoint
from tests.minicpm_checkpoints import save_minicpm_checkpoint
from tests.pictures import random_picture
from tests.qwen_checkpoints import (
    CAMERA,
    HYBRID,
    KEEP_ALL,
    REDUCED,
    save_qwen3_5_checkpoint,
    save_qwen3_vl_checkpoint,
    save_qwen_checkpoint,
)
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.pipeline import MOST_KEPT_IMAGES, Pipeline

if TYPE_CHECKING:
    from pathlib import Path

PICTURES = [random_picture(48, 48, seed=1), random_picture(70, 30, seed=2), random_picture(48, 48, seed=3)]
PROMPTS = ["w1 w2 w3", "w9 w8", "w5 w4 w3 w2 w1"]


def answer(
    pipeline: Pipeline, picture: Any, prompt: str
) -> tuple[bool, list[int], Any, list[list[int]], Any]:
    """Return whether the image was kept, and all that an answer says."""
    found = pipeline.generate(picture, prompt, max_new_tokens=4)
    assert found.text is not None
    assert ("vision" in found.statistics.graph_ms) != found.statistics.image_was_kept
    kept = [indices.tolist() for indices in found.kept]
    return found.statistics.image_was_kept, found.token_ids, found.first_logits, kept, found.boxes


def assert_same(got: Any, expected: Any) -> None:
    assert (got[1], got[3]) == (expected[1], expected[3])
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_array_equal(got[4], expected[4])


@pytest.fixture(scope="module")
def bundles(
    checkpoint: Path, reduced_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kept")
    encoder = Schedule(stages=(Stage(layer=2, keep=4),), positions="preserved")
    return {
        "tiles": reduced_bundle,
        "before the decoder": export(checkpoint, token_method="visionzip", token_keep=15),
        "in the encoder": export(
            save_qwen_checkpoint(folder / "qwen"), schedule=encoder, image_sizes=(CAMERA,), encoder_keep=0.4
        ),
        "deepstack": export(
            save_qwen3_vl_checkpoint(folder / "qwen3"), schedule=REDUCED, image_sizes=(CAMERA,)
        ),
    }


@pytest.mark.parametrize("name", ["tiles", "before the decoder", "in the encoder", "deepstack"])
def test_a_kept_image_gives_the_same_answers(name: str, bundles: dict[str, Path]) -> None:
    """Asked about in turn, so that other images have been seen in between; the second picture is the third's shape."""
    with (
        Pipeline.from_bundle(bundles[name], threads=1) as fresh,
        Pipeline.from_bundle(bundles[name], threads=1, keep_images=2) as keeping,
    ):
        for turn, prompt in enumerate(PROMPTS):
            for picture in PICTURES[:2]:
                got = answer(keeping, picture, prompt)
                assert got[0] == (turn > 0)
                assert_same(got, answer(fresh, picture, prompt))


def test_the_oldest_image_makes_room(reduced_bundle: Path) -> None:
    first, second, third = PICTURES
    with Pipeline.from_bundle(reduced_bundle, threads=1, keep_images=2) as pipeline:
        asked = [first, second, first, third, first, second, None, third]
        was_kept = [
            answer_without_image(pipeline) if one is None else answer(pipeline, one, "w1")[0] for one in asked
        ]
    assert was_kept == [False, False, True, False, True, False, False, False]


def answer_without_image(pipeline: Pipeline) -> bool:
    found = pipeline.generate(None, "w1", max_new_tokens=1)
    assert found.text is not None
    return found.statistics.image_was_kept


def test_an_image_that_made_room_before_its_answer_began_is_seen_again(reduced_bundle: Path) -> None:
    first, second, _ = PICTURES
    with (
        Pipeline.from_bundle(reduced_bundle, threads=1) as fresh,
        Pipeline.from_bundle(reduced_bundle, threads=1, keep_images=1) as pipeline,
    ):
        answer(pipeline, first, "w1")
        later = pipeline.generate(first, "w2 w3", max_new_tokens=4)  # it is kept now
        answer(pipeline, second, "w1")
        assert later.text is not None
        assert not later.statistics.image_was_kept
        expected = fresh.generate(first, "w2 w3", max_new_tokens=4)
        assert (expected.text, expected.token_ids) == (later.text, later.token_ids)
        np.testing.assert_array_equal(later.first_logits, expected.first_logits)


def test_pixels_count_not_where_they_come_from(reduced_bundle: Path, tmp_path: Path) -> None:
    picture = PICTURES[0]
    picture.save(tmp_path / "one.png")
    picture.save(tmp_path / "two.bmp")
    other = picture.copy()
    other.putpixel((0, 0), tuple(255 - level for level in picture.getpixel((0, 0))))  # type: ignore[union-attr]
    with Pipeline.from_bundle(reduced_bundle, threads=1, keep_images=1) as pipeline:
        images = [tmp_path / "one.png", str(tmp_path / "two.bmp"), picture, other]
        assert [answer(pipeline, image, "w1")[0] for image in images] == [False, True, True, False]


def test_nothing_is_kept_unless_asked_for(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        assert [answer(pipeline, PICTURES[0], "w1")[0] for _ in range(2)] == [False, False]


@pytest.mark.parametrize("count", [-1, MOST_KEPT_IMAGES + 1, 1.0, True, "2"])
def test_a_count_out_of_range_is_refused(count: Any, reduced_bundle: Path) -> None:
    with pytest.raises(ShapeError, match=f"keep_images: expected 0..{MOST_KEPT_IMAGES}, got "):
        Pipeline.from_bundle(reduced_bundle, keep_images=count)


FOLLOW_UPS: dict[str, dict[str, Any]] = {
    "keep-all": {},
    "two stages": {"schedule": Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))},
    "two images": {"schedule": Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6))), "max_images": 2},
    "looks at the layer before, before the decoder": {
        "schedule": Schedule(stages=(Stage(layer=2, keep=9),), method="fastv"), "token_method": "divprune", "token_keep": 15
    },
    "redone on the host": {"schedule": Schedule(stages=(Stage(layer=2, keep=14),), nms_rounds=1, nms_threshold=0.02)},
    "compares the question": {"token_method": "cdpruner", "token_keep": 15},
    "deepstack": {"schedule": REDUCED},
    "short convolutions": {"schedule": Schedule(stages=(Stage(layer=2, keep=14), Stage(layer=4, keep=6))), "max_text": 128},
    "states": {"schedule": HYBRID, "max_text": 192, "text_buckets": (192,)},
    "numbered images": {
        "schedule": Schedule(stages=(Stage(layer=3, keep=20), Stage(layer=7, keep=9))), "max_images": 2,
        "max_text": 192, "text_buckets": (192,),
    },
    "states, keep-all": {"schedule": KEEP_ALL, "max_text": 192, "text_buckets": (192,)},
}  # fmt: skip


def checkpoint_of(name: str, checkpoint: Path, folder: Path) -> Path:
    if name == "deepstack":
        return save_qwen3_vl_checkpoint(folder)
    if name == "short convolutions":
        return save_lfm2_vl_checkpoint(folder)
    if name == "numbered images":
        return save_minicpm_checkpoint(folder)
    return save_qwen3_5_checkpoint(folder) if name.startswith("states") else checkpoint


@pytest.mark.parametrize("name", FOLLOW_UPS)
def test_a_follow_up_starts_at_its_own_rows(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """The same bit for bit as without kept rows; as a bundle without follow-ups but for rounding."""
    folder = checkpoint_of(name, checkpoint, tmp_path / "ck")
    options = FOLLOW_UPS[name]
    shown = [PICTURES[:1], PICTURES[1:]] if "max_images" in options else [PICTURES[:1], PICTURES[1:2]]
    bundle = export(folder, follow_ups=True, **options)
    with (
        Pipeline.from_bundle(bundle, threads=1) as fresh,
        Pipeline.from_bundle(bundle, threads=1, keep_images=2) as keeping,
        Pipeline.from_bundle(export(folder, **options), threads=1) as plain,
    ):
        for turn, prompt in enumerate(PROMPTS):
            for pictures in shown:
                history = [("w1", "w2")] * (turn == 2)
                got, same, near = (
                    pipeline.generate(pictures, prompt, history=history, max_new_tokens=4)
                    for pipeline in (keeping, fresh, plain)
                )
                assert got.text == same.text == near.text
                assert got.statistics.prefix_was_kept == (turn > 0 and name != "compares the question")
                assert not same.statistics.prefix_was_kept
                np.testing.assert_array_equal(got.first_logits, same.first_logits)
                np.testing.assert_allclose(got.first_logits, near.first_logits, **LOGITS_FLOAT32)
                for other in (same, near):
                    assert [kept.tolist() for kept in got.kept] == [kept.tolist() for kept in other.kept]
        assert (
            keeping.generate(None, "w1 w2", max_new_tokens=2).text
            == plain.generate(None, "w1 w2", max_new_tokens=2).text
        )


@pytest.mark.parametrize("name", FOLLOW_UPS)
def test_questions_after_a_shared_prefill(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """One question runs after its own prompt's rows as within it; with nothing dropped, all run as each alone."""
    folder = checkpoint_of(name, checkpoint, tmp_path / "ck")
    options = FOLLOW_UPS[name]
    pictures = PICTURES[: options.get("max_images", 1)]
    asked = [Question.choice(text, ["w5", "w6 w7", "w6 w8"]) for text in ("w1 w2 w3", "w4", "w9 w9")]
    with Pipeline.from_bundle(export(folder, follow_ups=True, **options), threads=1) as pipeline:
        each = pipeline.decide(pictures, asked, sharing="each")
        for question, alone in zip(asked, each):
            (again,) = pipeline.decide(pictures, question, sharing="joint")
            np.testing.assert_allclose(
                np.log(again.probabilities), np.log(alone.probabilities), **LOGITS_FLOAT32
            )
            assert [kept.tolist() for kept in again.kept] == [kept.tolist() for kept in alone.kept]
        joint = pipeline.decide(pictures, asked)
        assert len({tuple(map(bytes, decision.kept)) for decision in joint}) == 1
        assert [decision.statistics.image_was_kept for decision in joint] == [False, True, True]
        if name.endswith("keep-all"):
            for alone, shared in zip(each, joint):
                np.testing.assert_allclose(shared.probabilities, alone.probabilities, **LOGITS_FLOAT32)
        later = pipeline.generate(pictures, "w1 w2", max_new_tokens=4)
        assert later.text == pipeline.generate(pictures, "w1 w2", max_new_tokens=4).text


def test_an_answer_after_other_text_goes_on_as_after_its_own_prompt(checkpoint: Path) -> None:
    """A label of several tokens decodes after a shared prefill; its rows follow the question's."""
    asked = [Question.choice(text, ["w5 w1 w2", "w6 w7 w8", "w6"]) for text in ("w1 w2 w3 w4 w5 w6", "w4")]
    with Pipeline.from_bundle(export(checkpoint, follow_ups=True), threads=1) as pipeline:
        for alone, shared in zip(
            pipeline.decide(PICTURES[0], asked, sharing="each"), pipeline.decide(PICTURES[0], asked)
        ):
            np.testing.assert_allclose(
                np.log(shared.probabilities), np.log(alone.probabilities), **LOGITS_FLOAT32
            )


def test_questions_share_a_prefill_only_where_they_can(reduced_bundle: Path, checkpoint: Path) -> None:
    question = Question.choice("w1", ["w2", "w3"])
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        with pytest.raises(
            ShapeError, match="sharing: expected an image, a bundle exported with --follow-ups"
        ):
            pipeline.decide(PICTURES[0], [question], sharing="joint")
        assert len(pipeline.decide(PICTURES[0], [question, question])) == 2
    with (
        Pipeline.from_bundle(export(checkpoint, follow_ups=True), threads=1) as pipeline,
        pytest.raises(ShapeError, match="sharing: expected an image"),
    ):
        pipeline.decide(None, [question], sharing="joint")
