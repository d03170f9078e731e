"""Qwen2.5-VL and Qwen3-VL through export and runtime: keep-all equals Hugging Face, reduced equals plain torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.pictures import random_picture
from tests.qwen_checkpoints import (
    CAMERA,
    REDUCED,
    hugging_face_inputs,
    save_qwen3_5_checkpoint,
    save_qwen3_vl_checkpoint,
    save_qwen_checkpoint,
)
from tests.spec.reduced_reference import reduced_logits
from tests.spec.test_selectors_through_bundles import rows_after, through_the_decoder
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.runtime.bundle.errors import ScheduleError, ShapeError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEEP_ALL = Schedule(positions="preserved")
SIZES = [CAMERA, (28, 28), (300, 40), (40, 300), (61, 59), (200, 200), (90, 33)]
PROMPTS = ["w1 w2 w3", "w9", "w5 w4 w3 w2 w1 w0 w7 w7"]


SAVE = {
    "qwen2_5_vl": save_qwen_checkpoint,
    "qwen3_vl": save_qwen3_vl_checkpoint,
    "qwen3_5": save_qwen3_5_checkpoint,
}
HYBRID = Schedule(
    stages=(Stage(layer=3, keep=9), Stage(layer=7, keep=4)), positions="preserved", probe_rows="answer"
)
"""Qwen3.5's layers 3 and 7 have attention. The first range has none: three layers with states."""


@pytest.fixture(scope="module", params=SAVE)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[family](tmp_path_factory.mktemp(family) / "ck")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


def load(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def keep_all(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(folder, schedule=KEEP_ALL, image_sizes=(CAMERA,))) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def schedule(family: str) -> Schedule:
    return HYBRID if family == "qwen3_5" else REDUCED


@pytest.fixture(scope="module")
def reduced(folder: Path, schedule: Schedule) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(folder, schedule=schedule, image_sizes=(CAMERA,))) as pipeline:
        yield pipeline


class Whole(NamedTuple):
    """A prompt as Hugging Face's model puts it together."""

    model: Any
    embeds: torch.Tensor
    positions: torch.Tensor
    visual: list[int]
    planes: list[torch.Tensor]


def prompt_of(model: Any, inputs: dict[str, torch.Tensor]) -> Whole:
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    spots = inputs["mm_token_type_ids"][0] == 1
    embeds[0, spots] = features.pooler_output[0]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    planes = [plane[0] for plane in getattr(features, "deepstack_features", ())]
    return Whole(model, embeds, positions, spots.nonzero()[:, 0].tolist(), planes)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    model: Any, keep_all: Pipeline, size: tuple[int, int], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = random_picture(*size, seed=size[0])
    inputs = hugging_face_inputs(keep_all, picture, prompt)
    assert_same_answer(model, keep_all, inputs, picture=picture, prompt=prompt, monkeypatch=monkeypatch)


def test_text_only_equals_hugging_face(
    model: Any, keep_all: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = hugging_face_inputs(keep_all, None, PROMPTS[0])
    assert_same_answer(model, keep_all, inputs, picture=None, prompt=PROMPTS[0], monkeypatch=monkeypatch)


@pytest.mark.parametrize("size", [CAMERA, (300, 40), (61, 59)], ids=str)
def test_reduced_bundle_equals_plain_torch(
    model: Any, reduced: Pipeline, schedule: Schedule, size: tuple[int, int]
) -> None:
    """Kept tokens, logits of the prefill, and of decode steps at the original length (a longer prefill)."""
    picture, prompt = random_picture(*size, seed=3), "w1 w2 w3 w4 w5 w6"
    inputs = hugging_face_inputs(reduced, picture, prompt)
    answer = reduced.generate(picture, prompt, max_new_tokens=1)
    _ = answer.text
    whole = prompt_of(model, inputs)
    logits, kept = reduced_logits(
        model, whole.embeds, schedule, visual=whole.visual, positions=whole.positions, planes=whole.planes
    )
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_a_selection_on_the_host_cuts_positions_and_deepstack_too(reduced: Pipeline) -> None:
    """Baselines, and stages whose NMS had not settled, go this way; here it takes what the graphs took."""
    picture = random_picture(*CAMERA, seed=3)
    own = reduced.generate(picture, PROMPTS[2], max_new_tokens=4)
    assert own.text is not None

    def as_the_graphs(stage: int, entering: np.ndarray[Any, Any], _keep: int) -> np.ndarray[Any, Any]:
        return np.flatnonzero(np.isin(entering, own.kept[stage])).astype(np.int32)

    ours = reduced.generate(picture, PROMPTS[2], max_new_tokens=4, override=as_the_graphs)
    assert (ours.text, ours.token_ids) == (own.text, own.token_ids)
    np.testing.assert_allclose(ours.first_logits, own.first_logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("method", ["divprune", "cdpruner"])
def test_a_selection_before_the_decoder_cuts_positions_and_deepstack_alike(
    model: Any, folder: Path, method: str
) -> None:
    """Whatever is kept, the decoder is Hugging Face's over the rows that are left."""
    picture, prompt = random_picture(*CAMERA, seed=3), PROMPTS[0]
    bundle = export(folder, schedule=KEEP_ALL, image_sizes=(CAMERA,), token_method=method, token_keep=7)
    with Pipeline.from_bundle(bundle) as pipeline:
        answer = pipeline.generate(picture, prompt, max_new_tokens=1)
        _ = answer.text
        kept = pipeline._level.vision._kept["reduce"].tolist()
        assert len(set(kept)) == answer.statistics.average_keep * answer.statistics.visual_tokens == 7
        whole = prompt_of(model, hugging_face_inputs(pipeline, picture, prompt))
    rows, visual = rows_after(kept, whole.visual, whole.embeds.shape[1])
    logits, _ = reduced_logits(
        model, whole.embeds[:, rows], KEEP_ALL, visual=visual,
        positions=whole.positions[..., rows], planes=[plane[kept] for plane in whole.planes],
    )  # fmt: skip
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


@pytest.mark.parametrize("method", ["fastv", "dart", "sparsevlm"])
def test_other_methods_inside_the_decoder_equal_their_modules(
    model: Any, folder: Path, family: str, method: str
) -> None:
    """FastV reads the layer before, DART keys, SparseVLM the prompt's rows, and it merges tokens."""
    stages = (Stage(layer=1, keep=11), Stage(layer=2, keep=6))
    if family == "qwen3_5":  # layer 3 has attention
        stages = (Stage(layer=4, keep=6),)
    schedule = Schedule(stages=stages, method=method, positions="preserved")  # type: ignore[arg-type]
    picture = random_picture(*CAMERA, seed=5)
    with Pipeline.from_bundle(export(folder, schedule=schedule, image_sizes=(CAMERA,))) as pipeline:
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        whole = prompt_of(model, hugging_face_inputs(pipeline, picture, PROMPTS[0]))
    logits, kept = through_the_decoder(whole, whole.embeds, whole.visual, schedule)
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits, **LOGITS_FLOAT32)


def test_decode_after_a_reduction_goes_on_at_the_original_positions(
    model: Any, reduced: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: list[list[int]] = []
    decoder = reduced._level.decoder
    decode, last_range = decoder.decode, len(decoder.caches) - 1

    def decode_and_record(row: Any) -> Any:
        top = decode(row)
        ids.append(decoder._memory.host(f"step.position_ids.{last_range}", (3, 1)).tolist())
        return top

    monkeypatch.setattr(decoder, "decode", decode_and_record)
    picture = random_picture(*CAMERA, seed=1)
    _ = reduced.generate(picture, PROMPTS[0], max_new_tokens=3).text
    inputs = hugging_face_inputs(reduced, picture, PROMPTS[0])
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    following = int(positions.max()) + 1
    assert ids == [[[following]] * 3, [[following + 1]] * 3]


def test_the_camera_has_no_padding(reduced: Pipeline) -> None:
    prepared = reduced._level.vision.prepare(random_picture(*CAMERA), PROMPTS[0])
    inputs = prepared.inputs
    assert len(inputs["token_index"]) == prepared.layout.num_visual
    assert inputs["num_patches"][0] == len(inputs["pixel_values"])


def test_encoder_reduction_keeps_positions_and_boxes_of_what_it_keeps(tmp_path: Path) -> None:
    """With an encoder that keeps 8 of 20 tokens before a stage; a smaller picture passes whole."""
    schedule = Schedule(stages=(Stage(layer=2, keep=4),), positions="preserved")
    folder = save_qwen_checkpoint(tmp_path / "ck")
    bundle = export(folder, schedule=schedule, image_sizes=(CAMERA,), encoder_keep=0.4)
    with Pipeline.from_bundle(bundle) as pipeline:
        prepared = pipeline._level.vision.prepare(random_picture(*CAMERA, seed=2), PROMPTS[0])
        seen = pipeline._level.vision.encode_images([prepared], after=None, text_bucket=64)
        pipeline._graphs.device.synchronize()
        boxes = pipeline._level.vision.entering(0).boxes
        ((positions, span),) = seen.positions
        assert seen.tokens.shape[0] == seen.rows == boxes.shape[0] == positions.shape[1] == 8
        assert span == 5
        corners = positions[[2, 1]].T * [150 / 5, 100 / 4]
        np.testing.assert_allclose(boxes[:, :2], corners, atol=1e-4)
        answer = pipeline.generate(random_picture(*CAMERA, seed=2), PROMPTS[0], max_new_tokens=3)
        assert answer.text is not None
        assert answer.statistics.visual_tokens == 8
        assert answer.statistics.kept_tokens == (4,)
        assert (
            pipeline._level.vision.encode_images(
                [pipeline._level.vision.prepare(random_picture(56, 56), PROMPTS[0])],
                after=None,
                text_bucket=64,
            ).tokens.shape[0]
            == 4
        )


def test_every_graph_is_built_by_tensorrt(folder: Path, schedule: Schedule, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(export(folder, schedule=schedule, image_sizes=(CAMERA,)))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


def test_compact_positions_are_refused(folder: Path, family: str) -> None:
    with pytest.raises(ScheduleError, match=f"positions: expected preserved for {family}, got compact"):
        export(folder, schedule=Schedule(positions="compact"))


def test_a_picture_too_thin_for_the_model_is_refused(reduced: Pipeline) -> None:
    with pytest.raises((ShapeError, ValueError), match="200"):
        reduced.generate(random_picture(4100, 20), PROMPTS[0])


def test_tied_bfloat16_checkpoint_is_exported_as_float16(family: str, tmp_path: Path) -> None:
    """Qwen2.5-VL-3B and Qwen3-VL-4B tie their heads to their embeddings, and their weights are bfloat16."""
    num_layers = 4 if family == "qwen3_5" else 2
    folder = SAVE[family](tmp_path / "ck", tie=True, num_layers=num_layers, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder, schedule=KEEP_ALL)) as pipeline:
        assert pipeline.manifest.dtype == "float16"
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        assert answer.text is not None
        _, logits = generate(load(folder), hugging_face_inputs(pipeline, picture, PROMPTS[0]))
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)
