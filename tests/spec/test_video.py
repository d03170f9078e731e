"""Videos through the whole pipeline: keep-all equals Hugging Face, with images and text around; reduced equals plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.decode_logits import record_logits
from tests.pictures import random_picture
from tests.qwen_checkpoints import CAMERA, IMAGE_ID, VIDEO_ID
from tests.spec.reduced_reference import entering_the_decoder, reduced_logits
from tests.spec.test_qwen_vl import SAVE, load
from tests.spec.whole_answers import NUM_STEPS, generate
from tests.tolerances import LOGITS_FLOAT32
from tests.videos import write_video
from trio_edge.runtime.bundle.errors import ImageError, ScheduleError, ShapeError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio_edge.runtime.prompts.chat import Message

KEEP_ALL = Schedule(positions="preserved")
REDUCED = msgspec.structs.replace(KEEP_ALL, stages=(Stage(layer=1, keep=25), Stage(layer=2, keep=9)))
FRAMES = [random_picture(*CAMERA, seed=seed) for seed in range(5)]


@dataclass(frozen=True)
class Subject:
    folder: Path
    model: Any
    keep_all: Pipeline
    reduced: Pipeline


@pytest.fixture(scope="module", params=SAVE)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    folder, schedule = SAVE[request.param](tmp_path_factory.mktemp(request.param) / "ck"), REDUCED
    if request.param == "qwen3_5":
        schedule = msgspec.structs.replace(KEEP_ALL, stages=(Stage(layer=3, keep=25), Stage(layer=7, keep=9)))
    options = {"max_frames": 8, "max_text": 192 if request.param == "qwen3_5" else 128}
    with (
        Pipeline.from_bundle(export(folder, schedule=KEEP_ALL, **options)) as keep_all,
        Pipeline.from_bundle(export(folder, schedule=schedule, **options)) as reduced,
    ):
        yield Subject(folder, load(folder), keep_all, reduced)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _video(frames: list[Any], **settings: Any) -> dict[str, Any]:
    return {"type": "video", "video": frames, "source_fps": 4.0, **settings}


PICTURE = {"type": "image", "image": random_picture(60, 45, seed=9)}
CONVERSATIONS: dict[str, list[Message]] = {
    "a video": [{"role": "user", "content": [_video(FRAMES, num_frames=4), _text("w1 w2 w3")]}],
    "an odd number of frames": [
        {"role": "user", "content": [_text("w9 w8"), _video(FRAMES, fps=4), _text("w1")]}
    ],
    "an image and two videos": [
        {"role": "user", "content": [PICTURE, _text("w4"), _video(FRAMES[:4], num_frames=2), _text("w5 w6")]},
        {"role": "assistant", "content": [_text("w7")]},
        {"role": "user", "content": [_video(FRAMES[3:], num_frames=2), _text("w1 w2 w3 w4 w5 w6")]},
    ],
}


def hugging_face_inputs(pipeline: Pipeline, messages: list[Message]) -> dict[str, torch.Tensor]:
    """Return the model's inputs with the runtime's ids, frames and patches, which have tests of their own."""
    shown = pipeline.level_named().show(pipeline._decode(messages), "")
    ids = pipeline._encode(messages, [part.inset for part in shown])
    runs = [image.layout.num_visual for part in shown for image in part.prepared]
    input_ids = torch.from_numpy(ids.all_ids(runs).astype(np.int64))[None]
    kinds = (input_ids == IMAGE_ID).to(torch.int32) + 2 * (input_ids == VIDEO_ID).to(torch.int32)
    inputs: dict[str, torch.Tensor] = {"input_ids": input_ids, "mm_token_type_ids": kinds}
    for is_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        parts = [part for part in shown if part.is_video == is_video]
        if not parts:
            continue
        patches = [
            _patches(image.make_inputs(image.layout.sizes)) for part in parts for image in part.prepared
        ]
        inputs[pixels] = torch.from_numpy(np.concatenate(patches))
        inputs[grid] = torch.tensor([_grid(part.prepared) for part in parts])
    if pipeline.manifest.family == "qwen2_5_vl" and "video_grid_thw" in inputs:
        # each video has 4 frames per second, of which a share is taken
        videos = [part for message in messages for part in message["content"] if part["type"] == "video"]
        taken = [part.get("num_frames", 4) / len(part["video"]) for part in videos]
        inputs["second_per_grid_ts"] = torch.tensor([2 / (4.0 * share) for share in taken])
    return inputs


def _patches(inputs: dict[str, Any]) -> Any:
    count = len(inputs["token_index"])
    by_token = inputs["pixel_values"].reshape(count, 4, -1)[inputs["token_index"]]
    return by_token.reshape(4 * count, -1)


def _grid(units: list[Any]) -> list[int]:
    positions = units[0].layout.positions
    return [len(units), *(2 * (int(axis.max()) + 1) for axis in positions[1:])]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_keep_all_gives_the_tokens_of_hugging_face(
    subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = CONVERSATIONS[name]
    inputs = hugging_face_inputs(subject.keep_all, messages)
    tokens, logits = generate(subject.model, inputs)
    seen = record_logits(subject.keep_all, monkeypatch)
    answer = subject.keep_all.chat(messages, max_new_tokens=NUM_STEPS)
    assert answer.text is not None
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_reduced_bundle_equals_plain_torch(subject: Subject, name: str) -> None:
    messages = CONVERSATIONS[name]
    inputs = hugging_face_inputs(subject.reduced, messages)
    entering = entering_the_decoder(subject.model, inputs)
    spots = inputs["mm_token_type_ids"][0] > 0
    logits, kept = reduced_logits(
        subject.model,
        entering["inputs_embeds"],
        subject.reduced.manifest.schedule,
        visual=spots.nonzero()[:, 0].tolist(),
        positions=entering["position_ids"][-3:],
        planes=entering.get("deepstack_visual_embeds") or (),
    )
    answer = subject.reduced.chat(messages, max_new_tokens=3)
    assert answer.text is not None
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_a_file_is_asked_about_like_its_frames(subject: Subject, tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", 9, size=(96, 64), fps=4)
    from_file = subject.keep_all.generate(None, "w1 w2", video=path, num_frames=4, max_new_tokens=4)
    assert from_file.text is not None
    import av

    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    in_memory = subject.keep_all.generate(
        None, "w1 w2", video=frames, source_fps=4, num_frames=4, max_new_tokens=4
    )
    assert in_memory.text == from_file.text
    np.testing.assert_array_equal(in_memory.first_logits, from_file.first_logits)
    assert len(from_file.images) == len(from_file.layouts) == 2


def test_evs_compares_with_the_frames_before_through_the_pipeline(subject: Subject) -> None:
    """Two pairs of frames: the second differs in one corner, so its kept tokens lie there."""
    bundle = export(
        subject.folder, schedule=KEEP_ALL, max_frames=4, max_text=128, image_sizes=(CAMERA,), token_method="evs", token_keep=6
    )  # fmt: skip
    frames = [FRAMES[0].copy() for _ in range(4)]
    for frame in frames[2:]:
        frame.paste(random_picture(60, 50, seed=5), (90, 50))
    with Pipeline.from_bundle(bundle) as pipeline:
        video = {"video": frames, "source_fps": 4.0, "num_frames": 4}
        answer = pipeline.generate(None, "w1 w2", max_new_tokens=2, **video)
        assert answer.text is not None
        first, second = answer.layouts
        assert len(first.boxes) == len(second.boxes) == 6
        assert (second.boxes[:, 0] >= 60).sum() >= 5  # the towers attend to the whole image
        assert (first.boxes[:, 0] < 60).any()
        # the same video again: nothing is left of the one before
        again = pipeline.generate(None, "w1 w2", max_new_tokens=2, **video)
        assert again.text == answer.text
        np.testing.assert_array_equal(again.first_logits, answer.first_logits)


def test_wrong_videos_are_one_line_and_nothing_is_lost(subject: Subject, tmp_path: Path) -> None:
    pipeline = subject.keep_all
    before = pipeline.generate(None, "w1", video=FRAMES, num_frames=4, source_fps=4, max_new_tokens=3)
    text = before.text
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "none.mkv", 0)
    for source in (
        tmp_path / "empty",
        tmp_path / "broken.mp4",
        tmp_path / "none.mkv",
        tmp_path / "missing.mp4",
        [],
    ):
        with pytest.raises(ImageError) as caught:
            pipeline.generate(None, "w1", video=source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ShapeError, match="expected at most"):  # visual tokens, or those of timestamps
        pipeline.generate(None, "w1", video=FRAMES * 10, source_fps=4, num_frames=50)
    again = pipeline.generate(None, "w1", video=FRAMES, num_frames=4, source_fps=4, max_new_tokens=3)
    assert again.text == text


def test_a_model_without_videos_says_so(keep_all_bundle: Path, checkpoint: Path) -> None:
    with (
        Pipeline.from_bundle(keep_all_bundle) as pipeline,
        pytest.raises(ShapeError, match="video: expected a model that takes videos"),
    ):
        pipeline.generate(None, "w1", video=FRAMES)
    with pytest.raises(
        ScheduleError, match="--max-frames: expected a model that takes videos, got llava_next"
    ):
        export(checkpoint, max_frames=8)
