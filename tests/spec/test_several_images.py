"""Prompts with several images, between and after text: keep-all equals Hugging Face, reduced equals plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.decode_logits import record_logits
from tests.engine_bundles import build_here
from tests.hugging_face import merges_smolvlm
from tests.internvl_checkpoints import save_internvl_checkpoint
from tests.onevision_checkpoints import save_onevision_checkpoint
from tests.pictures import random_picture
from tests.qwen_checkpoints import save_qwen3_vl_checkpoint, save_qwen_checkpoint
from tests.smolvlm_checkpoints import save_smolvlm_checkpoint
from tests.spec.reduced_reference import entering_the_decoder, reduced_logits
from tests.spec.test_selectors_through_bundles import rows_after
from tests.spec.whole_answers import NUM_STEPS, generate
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.runtime.bundle.errors import ImageError, ScheduleError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.tokenizer import Inset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from trio_edge.runtime.bundle.schedule import Positions
    from trio_edge.runtime.prompts.chat import Message


@dataclass(frozen=True)
class Family:
    save: Callable[..., Path]
    model_class: str
    positions: Positions = "compact"
    options: tuple[tuple[str, Any], ...] = ()
    num_stages: int = 1
    """Two where a second one can go wrong in its own way: with one axis of positions, and with DeepStack's planes."""


FAMILIES = {
    "llava": Family(lambda folder: save_checkpoint(folder, family="llava"), "LlavaForConditionalGeneration"),
    "llava_next": Family(save_checkpoint, "LlavaNextForConditionalGeneration", num_stages=2),
    "llava_onevision": Family(save_onevision_checkpoint, "LlavaOnevisionForConditionalGeneration"),
    "internvl": Family(save_internvl_checkpoint, "InternVLForConditionalGeneration"),
    "smolvlm": Family(
        save_smolvlm_checkpoint, "SmolVLMForConditionalGeneration", options=(("max_text", 192),)
    ),
    "qwen2_5_vl": Family(save_qwen_checkpoint, "Qwen2_5_VLForConditionalGeneration", "preserved"),
    "qwen3_vl": Family(
        save_qwen3_vl_checkpoint, "Qwen3VLForConditionalGeneration", "preserved", num_stages=2
    ),
}
STAGES = (Stage(layer=1, keep=30), Stage(layer=2, keep=11))
SIZES = [(60, 45), (37, 101), (28, 28), (130, 31)]


@dataclass(frozen=True)
class Subject:
    family: Family
    folder: Path
    model: Any
    keep_all: Pipeline
    reduced: Pipeline


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=merges_smolvlm) if name == "smolvlm" else name for name in FAMILIES],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    import transformers

    family = FAMILIES[request.param]
    folder = family.save(tmp_path_factory.mktemp(request.param) / "ck")
    model = getattr(transformers, family.model_class).from_pretrained(folder, dtype=torch.float32).eval()
    everything = Schedule(positions=family.positions)
    schedule = msgspec.structs.replace(everything, stages=STAGES[: family.num_stages])
    options = {"max_images": 4, **dict(family.options)}
    with (
        Pipeline.from_bundle(export(folder, schedule=everything, **options)) as keep_all,
        Pipeline.from_bundle(export(folder, schedule=schedule, **options)) as reduced,
    ):
        yield Subject(family, folder, model, keep_all, reduced)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _image(index: int) -> dict[str, Any]:
    return {"type": "image", "image": random_picture(*SIZES[index], seed=index)}


def _user(*content: Any) -> Message:
    return {"role": "user", "content": list(content)}


CONVERSATIONS: dict[str, list[Message]] = {
    "two images": [_user(_image(0), _image(1), _text("w1 w2 w3"))],
    "four images between text": [
        _user(
            _text("w5"), _image(0), _text("w6 w7"), _image(1), _image(2), _text("w8"), _image(3), _text("w9")
        )
    ],
    "an image in each turn": [
        _user(_image(3), _text("w1 w2")),
        {"role": "assistant", "content": [_text("w3 w4")]},
        _user(_text("w4"), _image(2), _text("w5 w6 w7 w8")),
    ],
    "twice the same": [_user(_image(2), _text("w1"), _image(2), _text("w2"))],
}


def hugging_face_inputs(pipeline: Pipeline, model: Any, messages: list[Message]) -> dict[str, torch.Tensor]:
    """Return the model's inputs with the runtime's ids and pixels, which have tests of their own."""
    pictures = [
        part["image"] for message in messages for part in message["content"] if part["type"] == "image"
    ]
    processing: Any = pipeline.images if len(pictures) == 1 else pipeline.images.of_several()
    layouts = [processing.layout(*picture.size) for picture in pictures]
    ids = pipeline._encode(messages, [Inset(layout.text) for layout in layouts])
    image_id = pipeline.manifest.text.image_token_id
    runs = [length for layout in layouts for length in layout.run_lengths]
    input_ids = torch.from_numpy(ids.all_ids(runs).astype(np.int64))[None]
    prepared = [processing.prepare(picture) for picture in pictures]
    inputs, model_type = {"input_ids": input_ids}, model.config.model_type
    pixels = [one["pixel_values"] for one in prepared]
    if model_type.startswith("qwen"):
        by_token = [_in_raster_order(one["pixel_values"], one["token_index"]) for one in prepared]
        grids = [[1, *(2 * side for side in processing.token_grid(*picture.size))] for picture in pictures]
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(by_token))
        inputs["image_grid_thw"] = torch.tensor(grids)
        inputs["mm_token_type_ids"] = (input_ids == image_id).to(torch.int32)
    elif model_type in ("llava_next", "llava_onevision"):
        most = max(len(tiles) for tiles in pixels)
        padded = [np.pad(tiles, [(0, most - len(tiles)), (0, 0), (0, 0), (0, 0)]) for tiles in pixels]
        inputs["pixel_values"] = torch.from_numpy(np.stack(padded))
        inputs["image_sizes"] = torch.tensor([picture.size[::-1] for picture in pictures])
        if model_type == "llava_onevision":
            inputs["batch_num_images"] = torch.tensor([len(pictures)])
    else:
        tiles = torch.from_numpy(np.concatenate(pixels))
        inputs["pixel_values"] = tiles[None] if model_type == "smolvlm" else tiles
    return inputs


def _in_raster_order(pixels: Any, token_index: Any) -> Any:
    return pixels.reshape(len(token_index), 4, -1)[token_index].reshape(pixels.shape)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_keep_all_gives_the_tokens_of_hugging_face(
    subject: Subject, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = CONVERSATIONS[name]
    tokens, logits = generate(subject.model, hugging_face_inputs(subject.keep_all, subject.model, messages))
    seen = record_logits(subject.keep_all, monkeypatch)
    answer = subject.keep_all.chat(messages, max_new_tokens=NUM_STEPS)
    assert answer.text is not None
    assert answer.token_ids == tokens
    np.testing.assert_allclose(np.stack([answer.first_logits, *seen]), logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_reduced_bundle_equals_plain_torch(subject: Subject, name: str) -> None:
    """One budget for all images: text between them stays, kept tokens keep their order."""
    messages = CONVERSATIONS[name]
    inputs = hugging_face_inputs(subject.reduced, subject.model, messages)
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
    answer = subject.reduced.chat(messages, max_new_tokens=3)
    assert answer.text is not None
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
    assert answer.statistics.visual_tokens == int(spots.sum()) == len(answer.boxes)


def test_a_selection_before_the_decoder_is_each_images_own(subject: Subject) -> None:
    """A token stays in the run that it comes from, whatever is kept of the others."""
    messages, everything = (
        CONVERSATIONS["an image in each turn"],
        Schedule(positions=subject.family.positions),
    )
    options = {"max_images": 2, "token_method": "divprune", "token_keep": 7, **dict(subject.family.options)}
    with Pipeline.from_bundle(export(subject.folder, schedule=everything, **options)) as pipeline:
        inputs = hugging_face_inputs(pipeline, subject.model, messages)
        answer = pipeline.chat(messages, max_new_tokens=3)
        assert answer.text is not None
        each = pipeline._vision._layouts
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
