"""What papers' tables need of trio-eval: controls, videos, OCR tokens, system prompts, boxes, and padded images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.evaluate.answering import as_kept
from trio_edge.calibration.metrics import METRICS
from trio_edge.calibration.questions import read_questions
from trio_edge.runtime.bundle.errors import DataError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.model.host_selection import drop_all
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


def evaluated(tmp_path: Path, *arguments: Any) -> list[dict[str, Any]]:
    out = tmp_path / "report.json"
    assert cli_eval.main([*map(str, arguments), "--json", str(out), "--quiet"]) == 0
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
    return runs


def test_without_any_visual_token_later_layers_see_the_text_alone(reduced_bundle: Path) -> None:
    """Then one image is as good as another from the first stage on; before it, layer 0 has seen them."""
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        one = pipeline.generate(random_picture(60, 40), "w1 w2", max_new_tokens=3, override=drop_all)
        assert one.text is not None
        assert one.statistics.kept_tokens == (0, 0)
        assert [len(kept) for kept in one.kept] == [0, 0]
        whole = one.statistics.visual_tokens + one.statistics.text_tokens
        rows = [cache.length for cache in pipeline._level.decoder.caches]
        assert rows == [whole + 2, one.statistics.text_tokens + 2, one.statistics.text_tokens + 2]


def test_controls_have_the_bundles_schedule(reduced_bundle: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path, questions_about(6))
    asked = [word for name in ("bundle", "wrong-image", "none") for word in ("--selection", name)]
    own, wrong, none = evaluated(tmp_path, reduced_bundle, "--data", questions, *asked)
    assert [run["run"]["method"] for run in (own, wrong, none)] == ["trio", "wrong-image", "none"]
    assert wrong["processed_tokens"] == own["processed_tokens"] > none["processed_tokens"]


def test_the_wrong_images_tokens_are_kept_at_the_same_places(reduced_bundle: Path) -> None:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        other = pipeline.generate(random_picture(48, 48, seed=1), "w1", max_new_tokens=1)
        asked = {"max_new_tokens": 1, "override": as_kept(other)}
        same_size = pipeline.generate(random_picture(48, 48, seed=2), "w1", **asked)  # type: ignore[arg-type]
        assert same_size.text is not None
        for ours, theirs in zip(same_size.kept, other.kept):
            np.testing.assert_array_equal(ours, theirs)
        asked = {"max_new_tokens": 1, "override": as_kept(other)}
        larger = pipeline.generate(random_picture(60, 40, seed=2), "w1", **asked)  # type: ignore[arg-type]
        assert larger.text is not None
        assert [len(kept) for kept in larger.kept] == [len(kept) for kept in other.kept]


def test_one_image_has_no_wrong_one(
    reduced_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path, questions_about(1))
    arguments = [str(reduced_bundle), "--data", str(questions), "--selection", "wrong-image", "--quiet"]
    assert cli_eval.main(arguments) == 2
    assert "expected questions about two images, got one" in capsys.readouterr().err


def test_a_system_prompt_reaches_the_model(keep_all_bundle: Path, tmp_path: Path) -> None:
    questions = write_questions(tmp_path, questions_about(2))
    (plain,) = evaluated(tmp_path, keep_all_bundle, "--data", questions)
    (told,) = evaluated(tmp_path, keep_all_bundle, "--data", questions, "--system", "w9 w8 w7")
    assert told["outcomes"][0]["text_tokens"] > plain["outcomes"][0]["text_tokens"]


def test_ocr_tokens_stand_between_question_and_suffix(tmp_path: Path) -> None:
    path = write_questions(tmp_path, questions_about(1, ocr_tokens=["stop", "42"]))
    (sample,) = read_questions(path, suffix="Answer briefly.")
    assert sample.question == "w0 w0\nReference OCR token: stop, 42\nAnswer briefly."
    path = write_questions(tmp_path, questions_about(1, ocr_tokens="stop"))
    with pytest.raises(DataError, match=r"questions.jsonl:1: expected a list 'ocr_tokens' of texts"):
        read_questions(path)


def frames(folder: Path, count: int = 6) -> Path:
    folder.mkdir()
    for number in range(count):
        random_picture(60, 40, seed=number).save(folder / f"{number}.png")
    return folder


def test_a_video_is_asked_about_and_counted(tmp_path: Path) -> None:
    stages = (Stage(layer=2, keep=3),)
    schedule = Schedule(stages=stages, positions="preserved")
    bundle = export(save_qwen3_vl_checkpoint(tmp_path / "ck"), schedule=schedule, max_frames=6, max_text=128)
    frames(tmp_path / "clip")
    lines = [{"video": "clip", "question": "w1 w2", "answer": "w3"}]
    (run,) = evaluated(tmp_path, bundle, "--data", write_questions(tmp_path, lines))
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        generation = pipeline.generate(None, "w1 w2", video=tmp_path / "clip", max_new_tokens=16)
        assert generation.text == run["outcomes"][0]["text"]
        assert run["visual_tokens"] == generation.statistics.visual_tokens > 3
    layers = open_bundle(bundle).manifest.dimensions.num_layers
    expected = (2 * run["visual_tokens"] + (layers - 2) * 3) / layers
    assert run["processed_tokens"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video": "none.mp4"}, "expected a video at .*none.mp4, got none"),
        ({"video": "p0.png", "image": "p0.png"}, "expected a text 'video' and no image with it"),
        ({"video": 3}, "expected a text 'video'"),
    ],
)
def test_a_broken_video_line_is_named(line: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_questions(tmp_path, [{"question": "w1", "answer": "w2", **line}])
    with pytest.raises(DataError, match=f"questions.jsonl:1: {message}"):
        read_questions(path, videos=True)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("[10, 10, 20, 20]", 1.0),
        ('{"bbox_2d": [10, 10, 20, 15.1]}', 1.0),
        ("the box is (10,10),(20,20)", 1.0),
        ("(10, 10, 20, 14)", 0.0),
        ("10 10", 0.0),
        ("[20, 20, 10, 10]", 0.0),
        ("no box", 0.0),
    ],
    ids=["same", "json", "two points", "less than half", "two numbers", "turned round", "none"],
)
def test_a_box_counts_from_half_of_the_union_on(text: str, score: float, tmp_path: Path) -> None:
    path = write_questions(tmp_path, questions_about(1, answer="[10, 10, 20, 20]"))
    (sample,) = read_questions(path)
    iou = METRICS["iou"]
    assert iou.complaint(sample) is None
    assert iou.score(iou.read(text, sample), sample) == score


def test_padded_images_show_what_a_crop_cuts_off(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", family="llava")
    found = {}
    for pad in (False, True):
        bundle = export(checkpoint, pad_images=pad)
        with Pipeline.from_bundle(bundle, threads=1) as pipeline:
            image = Image.new("RGB", (96, 32), "black")
            image.paste("red", (0, 0, 16, 32))  # outside of the middle square
            found[pad] = pipeline.images.prepare(image)["pixel_values"]
    assert np.ptp(found[False][0, 0]) < 1e-6
    assert np.ptp(found[True][0, 0]) > 1


def test_a_model_with_a_grid_is_not_padded(checkpoint: Path) -> None:
    with pytest.raises(ScheduleError, match="--pad-images: expected a model that takes one tile"):
        export(checkpoint, pad_images=True)


def test_small_images_of_qwen_are_enlarged(tmp_path: Path) -> None:
    checkpoint = save_qwen3_vl_checkpoint(tmp_path / "ck")
    counts = {}
    for least in (None, 12):
        sizes = {"min_visual": least, "max_visual": 12, "max_text": 128}
        bundle = export(checkpoint, schedule=Schedule(positions="preserved"), **sizes)
        with Pipeline.from_bundle(bundle, threads=1) as pipeline:
            generation = pipeline.generate(random_picture(48, 32), "w1", max_new_tokens=1)
            assert generation.text is not None
            counts[least] = generation.statistics.visual_tokens
    assert counts[12] >= 12 > (counts[None] or 0)


def test_min_visual_is_for_qwen_and_at_most_the_largest(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="--min-visual: expected a Qwen-VL model"):
        export(checkpoint, min_visual=4)
    with pytest.raises(ScheduleError, match=r"--min-visual: expected 1..12 \(--max-visual\), got 13"):
        export(save_qwen3_vl_checkpoint(tmp_path / "ck"), min_visual=13, max_visual=12)
