"""SmolVLM2 through export and runtime: keep-all equals Hugging Face, reduced equals plain torch, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.engine_bundles import build_here
from tests.hugging_face import merges_smolvlm
from tests.pictures import random_picture
from tests.smolvlm_checkpoints import (
    IMAGE_ID,
    MOST_TILES,
    TILE_SIZE,
    TOKENS_PER_TILE,
    processor,
    save_smolvlm_checkpoint,
    tokenizer,
)
from tests.spec.reduced_reference import reduced_logits
from tests.spec.test_selectors_through_bundles import rows_after, scalar, through_the_decoder
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.calibration.model.greedy import greedy_answer
from trio_edge.calibration.model.prompts import make_prompt
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.quantize.quantized_model import quantized_model
from trio_edge.calibration.questions import read_questions
from trio_edge.export.checkpoints.checkpoint import ALIASES, canonical_name, read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families.smolvlm import SmolVlm
from trio_edge.export.plan import token_selector
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.export.quantize.scales import CalibratedScales
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.cli.run import main as run
from trio_edge.runtime.images.interface import image_processing
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.chat import SMOLVLM_TEMPLATE, build_messages, render_chat
from trio_edge.runtime.prompts.tokenizer import Inset
from trio_edge.trio.methods import token_method
from trio_edge.trio.selectors.interface import TokenInputs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio_edge.runtime.images.interface import ImageProcessing

CAMERA = (101, 37)
SIZES = [CAMERA, (26, 26), (7, 9), (65, 63), (300, 41), (41, 300), (1, 90), (90, 1), (1, 1)]
PROMPTS = ["w1 w2 w3", "w5 w4 w3 w2 w1 w0 w7 w7"]
REDUCED = Schedule(stages=(Stage(layer=1, keep=13), Stage(layer=2, keep=5)))
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "image": build_messages("w1 w2", images=[None]),
    "text only": build_messages("w1 w2"),
    "system": build_messages("w1", images=[None], system="w3"),
    "history": build_messages(
        "w1",
        images=[None],
        history=[("w2", "w3")],
    ),
    "image after text": [
        {"role": "user", "content": [{"type": "text", "text": "w1"}, {"type": "image"}]},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_smolvlm_checkpoint(tmp_path_factory.mktemp("smolvlm") / "ck")


@pytest.fixture(scope="module")
def images(folder: Path) -> ImageProcessing:
    return family_images(folder)


def family_images(folder: Path, *, max_visual: int | None = None) -> ImageProcessing:
    return SmolVlm().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=max_visual)


def changed(folder: Path, tmp_path: Path, file: str, change: dict[str, Any]) -> Path:
    """Return a copy of the checkpoint with other values in a file."""
    copy = shutil.copytree(folder, tmp_path / "changed")
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def keep_all(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(folder)) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def reduced(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(reduced_bundle(folder)) as pipeline:
        yield pipeline


def load(folder: Path) -> Any:
    from transformers import SmolVLMForConditionalGeneration

    return SmolVLMForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def reduced_bundle(folder: Path, **options: Any) -> Path:
    return export(folder, schedule=REDUCED, image_sizes=(CAMERA,), **options)


def hugging_face_inputs(
    pipeline: Pipeline, picture: Any, prompt: str, **images: int
) -> dict[str, torch.Tensor]:
    """Return what Hugging Face's processor gives, with the runtime's pixels, which have tests of their own."""
    theirs = processor(**images)
    content = [{"type": "image"}] if picture is not None else []
    text = theirs.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
        add_generation_prompt=True,
    )
    inputs = dict(theirs(images=picture, text=text, return_tensors="pt"))
    if picture is not None:
        pixels = torch.from_numpy(pipeline.images.prepare(picture)["pixel_values"])[None]  # type: ignore[attr-defined]
        assert pixels.shape == inputs["pixel_values"].shape
        inputs["pixel_values"] = pixels
    return inputs


class Whole(NamedTuple):
    """A prompt as Hugging Face's model puts it together."""

    model: Any
    tokens: torch.Tensor
    embeds: torch.Tensor
    visual: list[int]


def prompt_of(model: Any, inputs: dict[str, torch.Tensor]) -> Whole:
    with torch.no_grad():
        (tokens,) = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    spots = inputs["input_ids"][0] == IMAGE_ID
    embeds[0, spots] = tokens
    return Whole(model, tokens, embeds, spots.nonzero()[:, 0].tolist())


# Whole answers


@merges_smolvlm
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    model: Any, keep_all: Pipeline, size: tuple[int, int], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids of 1 x 3, 3 x 1, 2 x 3 and 3 x 3 tiles."""
    picture = random_picture(*size, seed=size[0])
    inputs = hugging_face_inputs(keep_all, picture, prompt)
    assert_same_answer(model, keep_all, inputs, picture=picture, prompt=prompt, monkeypatch=monkeypatch)


@merges_smolvlm
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_an_image_of_one_tile_equals_hugging_face(
    model: Any, folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = random_picture(*size, seed=size[0])
    with Pipeline.from_bundle(export(folder, max_visual=TOKENS_PER_TILE)) as pipeline:
        inputs = hugging_face_inputs(pipeline, picture, PROMPTS[0], longest_edge=TILE_SIZE)
        assert_same_answer(
            model, pipeline, inputs, picture=picture, prompt=PROMPTS[0], monkeypatch=monkeypatch
        )


def test_text_only_equals_hugging_face(
    model: Any, keep_all: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = hugging_face_inputs(keep_all, None, PROMPTS[0])
    assert_same_answer(model, keep_all, inputs, picture=None, prompt=PROMPTS[0], monkeypatch=monkeypatch)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_ids_are_those_of_hugging_faces_processor(keep_all: Pipeline, size: tuple[int, int]) -> None:
    picture = random_picture(*size)
    layout = keep_all.images.layout(*size)  # type: ignore[attr-defined]
    ids = keep_all._encode(build_messages(PROMPTS[1], images=[picture]), [Inset(layout.text)])
    theirs = hugging_face_inputs(keep_all, picture, PROMPTS[1])["input_ids"][0]
    assert ids.all_ids(layout.run_lengths).tolist() == theirs.tolist()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reduced_bundle_equals_plain_torch(model: Any, reduced: Pipeline, size: tuple[int, int]) -> None:
    """Text between the tiles stays, whatever is kept of a tile."""
    picture, prompt = random_picture(*size, seed=3), "w1 w2 w3 w4 w5 w6"
    whole = prompt_of(model, hugging_face_inputs(reduced, picture, prompt))
    answer = reduced.generate(picture, prompt, max_new_tokens=1)
    _ = answer.text
    logits, kept = reduced_logits(model, whole.embeds, REDUCED, visual=whole.visual)
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "dart", "sparsevlm"])
def test_other_methods_inside_the_decoder_equal_their_modules(model: Any, folder: Path, method: str) -> None:
    """SparseVLM merges tokens of several tiles, and its second stage has less than a token of each."""
    schedule = Schedule(stages=(Stage(layer=1, keep=11), Stage(layer=2, keep=6)), method=method)  # type: ignore[arg-type]
    with Pipeline.from_bundle(export(folder, schedule=schedule)) as pipeline:
        for size in (CAMERA, (41, 300), (65, 63)):
            picture = random_picture(*size, seed=5)
            answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
            _ = answer.text
            whole = prompt_of(model, hugging_face_inputs(pipeline, picture, PROMPTS[0]))
            logits, kept = through_the_decoder(whole, whole.embeds, whole.visual, schedule)
            assert [indices.tolist() for indices in answer.kept] == kept
            np.testing.assert_allclose(answer.first_logits, logits, **LOGITS_FLOAT32)


@pytest.mark.parametrize("keep", [4, 30])
@pytest.mark.parametrize("method", ["divprune", "cdpruner", "uniform"])
def test_a_selection_before_the_decoder_leaves_each_token_in_its_tile(
    model: Any, folder: Path, method: Any, keep: int
) -> None:
    """With four tokens, most tiles have none left, and their text stands there all the same."""
    bundle = export(folder, image_sizes=(CAMERA,), token_method=method, token_keep=keep)
    selector = token_selector(method, num_keep=keep)
    with Pipeline.from_bundle(bundle) as pipeline:
        for size in (CAMERA, (90, 1)):
            picture = random_picture(*size, seed=3)
            answer = pipeline.generate(picture, PROMPTS[1], max_new_tokens=1)
            _ = answer.text
            whole = prompt_of(model, hugging_face_inputs(pipeline, picture, PROMPTS[1]))
            count, after = len(whole.visual), whole.embeds[0, whole.visual[-1] + 1 :]
            text = (
                {"text_TD": after, "num_text": scalar(len(after))} if token_method(method).reads_text else {}
            )
            newline = torch.zeros(count, dtype=torch.bool)
            kept = selector(TokenInputs(whole.tokens, scalar(count), newline, **text)).kept_K.tolist()
            assert pipeline._level.vision._kept["reduce"].tolist() == kept
            rows, visual = rows_after(kept, whole.visual, whole.embeds.shape[1])
            logits, _ = reduced_logits(model, whole.embeds[:, rows], Schedule(), visual=visual)
            np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
            assert answer.statistics.average_keep == pytest.approx(keep / count)


def test_a_selection_before_the_decoder_combines_with_stages_inside(model: Any, folder: Path) -> None:
    picture = random_picture(*CAMERA, seed=4)
    bundle = reduced_bundle(folder, token_method="divprune", token_keep=21)
    with Pipeline.from_bundle(bundle) as pipeline:
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        whole = prompt_of(model, hugging_face_inputs(pipeline, picture, PROMPTS[0]))
        first = pipeline._level.vision._kept["reduce"].tolist()
    rows, visual = rows_after(first, whole.visual, whole.embeds.shape[1])
    logits, kept = reduced_logits(model, whole.embeds[:, rows], REDUCED, visual=visual)
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


def test_a_selection_on_the_host_gives_the_graphs_answer(reduced: Pipeline) -> None:
    """Stages whose NMS had not settled go this way; here it takes what the graphs took."""
    picture = random_picture(*CAMERA, seed=3)
    own = reduced.generate(picture, PROMPTS[1], max_new_tokens=4)
    assert own.text is not None

    def as_the_graphs(stage: int, entering: np.ndarray[Any, Any], _keep: int) -> np.ndarray[Any, Any]:
        return np.flatnonzero(np.isin(entering, own.kept[stage])).astype(np.int32)

    ours = reduced.generate(picture, PROMPTS[1], max_new_tokens=4, override=as_the_graphs)
    assert (ours.text, ours.token_ids) == (own.text, own.token_ids)
    np.testing.assert_allclose(ours.first_logits, own.first_logits, **LOGITS_FLOAT32)


def test_a_second_question_about_an_image_that_was_kept_answers_alike(
    folder: Path, keep_all: Pipeline
) -> None:
    picture = random_picture(*CAMERA, seed=8)
    with Pipeline.from_bundle(export(folder), keep_images=1) as pipeline:
        for prompt in PROMPTS:
            ours, theirs = (one.generate(picture, prompt, max_new_tokens=3) for one in (pipeline, keep_all))
            assert ours.text == theirs.text
            np.testing.assert_array_equal(ours.first_logits, theirs.first_logits)
        assert ours.statistics.image_was_kept


@merges_smolvlm
def test_tied_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    folder = save_smolvlm_checkpoint(tmp_path / "ck", tie=True, num_layers=1, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder)) as pipeline:
        assert pipeline.manifest.dtype == "float16"
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        _, logits = generate(load(folder), hugging_face_inputs(pipeline, picture, PROMPTS[0]))
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


def test_an_int4_bundle_computes_what_its_torch_twin_does(folder: Path, tmp_path: Path) -> None:
    model, plan = load_model(str(folder)), parse_plan("all=int4")
    (question,) = read_questions(write_questions(tmp_path, questions_about(1)))
    with torch.inference_mode(), quantized_model(model, REDUCED, plan, CalibratedScales(), dtype="float32"):
        prompt = make_prompt(model, question)
        ours = greedy_answer(model, prompt, REDUCED, max_tokens=4)
    with Pipeline.from_bundle(reduced_bundle(folder, quantize=plan), cpu_accuracy="float32") as pipeline:
        answer = pipeline.generate(question.images, question.question, max_new_tokens=4)
        _ = answer.text
        assert pipeline.manifest.quantization is not None
    assert [kept.tolist() for kept in ours.kept] == [kept.tolist() for kept in answer.kept]
    assert ours.tokens == answer.token_ids
    np.testing.assert_allclose(answer.first_logits, ours.logits_TV[0], **LOGITS_FLOAT32)


def test_every_graph_is_built_by_tensorrt(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(reduced_bundle(folder))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


@pytest.mark.parametrize("method", [None, "divprune"])
def test_kept_tokens_are_drawn(folder: Path, tmp_path: Path, method: Any) -> None:
    """Tiles as one grid, and the tile of the whole image as outlines; also where some tokens never entered the decoder."""
    reduction = {} if method is None else {"token_method": method, "token_keep": 21}
    bundle, file, drawing = reduced_bundle(folder, **reduction), tmp_path / "a.png", tmp_path / "b.png"
    random_picture(*CAMERA, seed=7).save(file)
    arguments = [str(bundle), "--image", str(file), "--prompt", PROMPTS[0], "--show-kept", str(drawing)]
    assert run([*arguments, "--max-new-tokens", "1"]) == 0
    with Image.open(drawing) as image:
        assert image.width > 2 * CAMERA[0]
    with Pipeline.from_bundle(bundle) as pipeline:
        answer = pipeline.generate(file, PROMPTS[0], max_new_tokens=1)
        _ = answer.text
        whole = pipeline.images.layout(*CAMERA)  # type: ignore[attr-defined]
    (layout,) = answer.layouts
    of_overview = whole.boxes[list(whole.overview)]
    drawn_so = [index for index, box in enumerate(layout.boxes) if (box == of_overview).all(1).any()]
    assert list(layout.overview) == drawn_so
    assert len(drawn_so) == layout.run_lengths[-1] > 0


# The vision graph


@pytest.fixture(scope="module")
def vision(folder: Path) -> ort.InferenceSession:
    bundle = open_bundle(export(folder))
    return ort.InferenceSession(bundle.path("vision.onnx"), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_vision_graph_gives_the_features_of_hugging_face(
    model: Any, images: ImageProcessing, vision: ort.InferenceSession, size: tuple[int, int]
) -> None:
    inputs = images.prepare(random_picture(*size, seed=size[0]), images.any_image_sizes()[-1])
    used = images.sizes(*size)
    with torch.no_grad():
        pixels = torch.from_numpy(inputs["pixel_values"][: used["B"]])
        (theirs,) = model.get_image_features(pixels[None]).pooler_output
    (tokens,) = vision.run(None, inputs)
    assert tokens.shape[0] == len(inputs["token_index"])
    np.testing.assert_allclose(tokens[: used["N"]], theirs.numpy(), **LOGITS_FLOAT32)


def test_the_bundle_has_the_familys_image_processing(folder: Path, images: ImageProcessing) -> None:
    manifest = open_bundle(export(folder)).manifest
    assert image_processing(manifest.image_processing, encoder_keep=None) == images


# The prompt


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_text_between_the_runs_tokenizes_as_in_hugging_faces_processor(
    images: ImageProcessing, size: tuple[int, int]
) -> None:
    rendered = render_chat(build_messages("w1 w2", images=[None]), template=SMOLVLM_TEMPLATE)
    theirs = processor()(images=random_picture(*size), text=rendered, return_tensors="np")
    before, after = rendered.split("<image>")
    layout = images.layout(*size)
    first, *middle, last = layout.text
    ids: list[int] = []
    for piece, count in zip((before + first, *middle, last + after), (*layout.run_lengths, 0), strict=True):
        ids += [*tokenizer()(piece)["input_ids"], *[IMAGE_ID] * count]
    assert ids == theirs["input_ids"][0].tolist()
    assert theirs["pixel_values"].shape[1] == images.sizes(*size)["B"]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_the_default_template_writes_what_hugging_faces_does(
    question: str, add_generation_prompt: bool
) -> None:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    ours, theirs = (
        render_chat(QUESTIONS[question], template=template, add_generation_prompt=add_generation_prompt)
        for template in (SMOLVLM_TEMPLATE, DEFAULT_CHAT_TEMPLATE)
    )
    assert ours == theirs


def test_a_checkpoint_without_a_template_gets_the_default(folder: Path) -> None:
    checkpoint = read_checkpoint(str(folder))
    template = SmolVlm().default_chat_template(checkpoint)
    text = read_text_files(checkpoint, default_template=template, image_marks=SmolVlm.image_marks)
    assert text.chat_template == SMOLVLM_TEMPLATE
    assert (text.spec.image_token, text.spec.bos_token) == ("<image>", "<|im_start|>")


@pytest.mark.parametrize("named", [True, False])
def test_marks_are_the_tokenizers_where_it_names_them(folder: Path, tmp_path: Path, named: bool) -> None:
    special = {"fake_image_token": "w1", "global_image_token": "w2"} if named else {}
    copy = changed(folder, tmp_path, "tokenizer_config.json", {"extra_special_tokens": special})
    marks = ("w1", "w2") if named else ("<fake_token_around_image>", "<global-img>")
    assert family_images(copy, max_visual=TOKENS_PER_TILE).layout(9, 9).text == (
        marks[0] + marks[1],
        marks[0],
    )


# Options and checkpoints


@pytest.mark.parametrize(
    ("max_visual", "tiles"), [(90, 10), (91, 10), (89, 5), (45, 5), (44, 1), (9, 1)], ids=str
)
def test_max_visual_limits_the_tiles(folder: Path, max_visual: int, tiles: int) -> None:
    limited = family_images(folder, max_visual=max_visual)
    assert limited.any_image_sizes()[-1] == {"B": tiles, "N": tiles * TOKENS_PER_TILE}
    longest_edge = {10: MOST_TILES, 5: 2, 1: 1}[tiles] * TILE_SIZE
    theirs = processor(longest_edge=longest_edge)  # what its users lower for fewer tiles
    picture = random_picture(*CAMERA)
    pixels = theirs(images=picture, text="<image>", return_tensors="np")["pixel_values"]
    assert limited.prepare(picture)["pixel_values"].shape == pixels[0].shape


def test_fewer_visual_tokens_than_a_tile_has_are_refused(folder: Path) -> None:
    with pytest.raises(
        ScheduleError, match=r"--max-visual: expected at least 9 \(one tile\), got 8; raise it"
    ):
        family_images(folder, max_visual=8)


def test_encoder_reduction_is_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="--encoder-keep: expected none for smolvlm, got 32"):
        SmolVlm().image_processing(read_checkpoint(str(folder)), encoder_keep=32, max_visual=None)


def test_features_of_a_class_token_are_refused(folder: Path, images: ImageProcessing) -> None:
    with pytest.raises(ScheduleError, match="expected one that needs no class token for smolvlm"):
        SmolVlm().build(read_checkpoint(str(folder)), processing=images, dtype="float32", with_features=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_factor": 4}, r"expected a scale_factor that divides 6 \(patches along a tile\), got 4"),
        ({"scale_factor": 0}, r"scale_factor: expected a number in 1\.\..*, got 0"),
        ({"text_config": {"model_type": "mistral"}}, "decoder of type llama, got 'mistral'"),
        ({"vision_config": {"image_size": [26, 26]}}, r"one number as vision image_size, got \[26, 26\]"),
        ({"vision_config": {"image_size": 48}}, r"expected max_image_size 48 \(the vision tower's\), got 26"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_followed_are_refused(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    merged = {
        key: {**config[key], **value} if isinstance(value, dict) else value for key, value in change.items()
    }
    with pytest.raises(CheckpointError, match=message):
        family_images(changed(folder, tmp_path, "config.json", merged))


def test_a_processor_that_counts_other_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = changed(folder, tmp_path, "processor_config.json", {"image_seq_len": 16})
    with pytest.raises(CheckpointError, match=r"expected image_seq_len 9 \(config.json\), got 16; make them"):
        family_images(copy)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("model.text_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("model.vision_model.post_layernorm.bias", "vision_tower.post_layernorm.bias"),
        ("model.connector.modality_projection.proj.weight", "connector.modality_projection.proj.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("text_model.final_layer_norm.weight", "text_model.final_layer_norm.weight"),  # CLIP's
    ],
)
def test_tensors_have_canonical_names(name: str, ours: str) -> None:
    assert canonical_name(name) == ours


@pytest.mark.parametrize(
    ("size", "repository"),
    [("256m", "256M-Video-Instruct"), ("500m", "500M-Video-Instruct"), ("2.2b", "2.2B-Instruct")],
)
def test_aliases_name_the_published_checkpoints(size: str, repository: str) -> None:
    assert ALIASES[f"smolvlm2-{size}"].repository == f"HuggingFaceTB/SmolVLM2-{repository}"
