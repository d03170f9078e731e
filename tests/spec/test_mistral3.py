"""Ministral 3, and Mistral Small 3.1's decoder, through export and runtime: keep-all equals Hugging Face, reduced plain torch.

``tests/several_images.py`` has the original processor's tokens and pixels.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.bundles import export
from tests.engine_bundles import build_here
from tests.matmul_flops import example_feeds, matmul_flops
from tests.mistral3_checkpoints import (
    IMAGE_ID,
    LONGEST_EDGE,
    ORIGINAL_LENGTH,
    PATCH_SIZE,
    ROPE,
    save_mistral3_checkpoint,
    their_inputs,
)
from tests.pictures import random_picture
from tests.spec.reduced_reference import causal_layer, entering_the_decoder, reduced_logits
from tests.spec.whole_answers import assert_same_answer, generate
from tests.tolerances import LOGITS_FLOAT16, LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import ALIASES, read_checkpoint
from trio_edge.export.families.mistral import Mistral3
from trio_edge.export.graphs.attention import ATTENTION_NAME, DecoderRange, RotaryTables, register_attention
from trio_edge.export.quantize.plan import parse_plan
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.trio.cost.bundle_work import graph_work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trio_edge.runtime.bundle.schedule import Positions

STAGES = (Stage(layer=1, keep=13), Stage(layer=2, keep=5))
CAMERA = (60, 45)
SIZES = [CAMERA, (52, 52), (9, 7), (37, 101), (130, 31), (16, 8), (25, 51)]
PROMPTS = ["w1 w2 w3", "w5 w4 w3 w2 w1 w0 w7 w7"]


@pytest.fixture(scope="module", params=["ministral3", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ministral 3, and Mistral Small 3.1, whose decoder has neither YaRN nor a scale of queries."""
    return save_mistral3_checkpoint(tmp_path_factory.mktemp("mistral3") / "ck", text_type=request.param)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def keep_all(folder: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export(folder)) as pipeline:
        yield pipeline


def load(folder: Path) -> Any:
    from transformers import Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def reduced_bundle(folder: Path, positions: Positions = "compact", **options: Any) -> Path:
    return export(
        folder, schedule=Schedule(stages=STAGES, positions=positions), image_sizes=(CAMERA,), **options
    )


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_all_bundle_gives_the_tokens_of_hugging_face(
    model: Any, keep_all: Pipeline, size: tuple[int, int], prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most prompts are longer than the original length, so that decoded tokens have scales, too."""
    picture = random_picture(*size, seed=size[0])
    inputs = their_inputs(picture, prompt, keep_all.images)
    assert_same_answer(model, keep_all, inputs, picture=picture, prompt=prompt, monkeypatch=monkeypatch)


def test_text_only_equals_hugging_face(
    model: Any, keep_all: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale begins to differ from 1 while the answer is decoded."""
    inputs = their_inputs(None, PROMPTS[1], keep_all.images)
    assert inputs["input_ids"].shape[1] < ORIGINAL_LENGTH
    assert_same_answer(
        model, keep_all, inputs, picture=None, prompt=PROMPTS[1], monkeypatch=monkeypatch, num_steps=24
    )


@pytest.mark.parametrize("positions", ["compact", "preserved"])
def test_reduced_bundle_equals_plain_torch(model: Any, folder: Path, positions: Positions) -> None:
    """After a stage the scale follows the positions that the layer gets; marks between rows stay."""
    with Pipeline.from_bundle(reduced_bundle(folder, positions)) as pipeline:
        for size in (CAMERA, (37, 101), (130, 31), (9, 7)):
            kept_as_in_plain_torch(pipeline, model, size)


def kept_as_in_plain_torch(pipeline: Pipeline, model: Any, size: tuple[int, int]) -> list[list[int]]:
    """Compare a reduced answer with plain torch, and return what its stages keep."""
    picture, prompt = random_picture(*size, seed=3), "w1 w2 w3 w4 w5 w6"
    inputs = their_inputs(picture, prompt, pipeline.images)
    answer = pipeline.generate(picture, prompt, max_new_tokens=1)
    assert answer.text is not None
    spots = (inputs["input_ids"][0] == IMAGE_ID).nonzero()[:, 0].tolist()
    embeds = entering_the_decoder(model, inputs)["inputs_embeds"]
    logits, kept = reduced_logits(model, embeds, pipeline.manifest.schedule, visual=spots)
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)
    return kept


def test_the_scale_of_queries_decides_what_is_kept(tmp_path: Path) -> None:
    """Otherwise the test above might pass without it."""
    kept = []
    for beta in (0.0, 3.0):
        folder = save_mistral3_checkpoint(tmp_path / str(beta))
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["rope_parameters"]["llama_4_scaling_beta"] = beta
        (folder / "config.json").write_text(json.dumps(config))
        with Pipeline.from_bundle(reduced_bundle(folder)) as pipeline:
            kept.append(kept_as_in_plain_torch(pipeline, load(folder), CAMERA))
    assert kept[0] != kept[1]


def test_positions_beyond_float16_have_their_scale(tmp_path: Path) -> None:
    """Graphs are traced with float16 as torch's default type."""
    model = load(save_mistral3_checkpoint(tmp_path / "ck", num_layers=1))
    decoder = model.get_decoder()
    tables = RotaryTables(
        decoder.rotary_emb.inv_freq[None], attention_scaling=decoder.rotary_emb.attention_scaling
    )
    hidden, positions = torch.randn(1, 3, 64), torch.tensor([[40_000, 70_000, 200_000]])
    decoder.config._attn_implementation = "eager"
    expected = causal_layer(model, 0, hidden, positions)
    register_attention()
    decoder.config._attn_implementation = ATTENTION_NAME
    empty = torch.empty(1, 2, 0, 24)
    torch.set_default_dtype(torch.float16)
    try:
        with torch.no_grad():
            got = DecoderRange(decoder.layers, tables)(
                hidden, positions.to(torch.int32), torch.tensor([0]), empty, empty
            )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["fastv", "sparsevlm", "pyramiddrop", "dart"])
def test_other_selectors_run_with_scaled_queries(method: str, tmp_path: Path) -> None:
    folder = save_mistral3_checkpoint(tmp_path / "ck")
    schedule = Schedule(stages=STAGES[:1], method=method)
    with Pipeline.from_bundle(export(folder, schedule=schedule, image_sizes=(CAMERA,))) as pipeline:
        answer = pipeline.generate(random_picture(*CAMERA), PROMPTS[0], max_new_tokens=2)
        assert answer.text is not None
        assert [len(indices) for indices in answer.kept] == [STAGES[0].keep]


def test_every_graph_is_built_by_tensorrt(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    bundle = open_bundle(reduced_bundle(folder))
    sizes = build_here(bundle, tmp_path)
    assert all(sizes[spec.name] > spec.weight_bytes for spec in bundle.manifest.graphs)


@pytest.mark.parametrize("plan", ["int4", "int8"])
def test_a_quantized_bundle_answers_and_is_built_by_tensorrt(plan: str, tmp_path: Path) -> None:
    """The probe of a quantized layer shares its products, and scales their queries after that."""
    folder = save_mistral3_checkpoint(tmp_path / "ck")
    bundle = open_bundle(reduced_bundle(folder, quantize=parse_plan(plan), dtype="float16"))
    with Pipeline.from_bundle(bundle.folder) as pipeline:
        answer = pipeline.generate(random_picture(*CAMERA, seed=3), PROMPTS[0], max_new_tokens=3)
        assert answer.text is not None
        assert [len(indices) for indices in answer.kept] == [stage.keep for stage in STAGES]
    pytest.importorskip("tensorrt_rtx", reason="has wheels for x86-64 Linux only; runs in CI")
    assert build_here(bundle, tmp_path).keys() == {graph.name for graph in bundle.manifest.graphs}


def test_the_graphs_have_the_products_that_are_counted(folder: Path) -> None:
    """Besides them there is the patches' embedding, which is a convolution in other towers."""
    bundle = open_bundle(reduced_bundle(folder))
    embedding = 2 * 3 * PATCH_SIZE**2 * bundle.manifest.vision.hidden_size  # type: ignore[union-attr]
    for graph in bundle.manifest.graphs:
        for part in graph.split():
            profile = part.profiles[0]
            found = matmul_flops(bundle.path(part.file), example_feeds(part, profile))
            more = embedding * profile.sizes["P"] if graph.role == "vision" else 0
            assert graph_work(bundle.manifest, graph, profile).flops + more == found, part.name


def test_tied_bfloat16_checkpoint_is_exported_as_float16(tmp_path: Path) -> None:
    folder = save_mistral3_checkpoint(tmp_path / "ck", tie=True, num_layers=1, dtype=torch.bfloat16)
    with Pipeline.from_bundle(export(folder)) as pipeline:
        assert pipeline.manifest.dtype == "float16"
        picture = random_picture(*CAMERA)
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=1)
        assert answer.text is not None
        _, logits = generate(load(folder), their_inputs(picture, PROMPTS[0], pipeline.images))
        np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT16)


@pytest.mark.parametrize(("most", "edge"), [(49, LONGEST_EDGE), (48, 48), (30, 40), (1, 8)])
def test_max_visual_lowers_the_longest_edge(folder: Path, most: int, edge: int) -> None:
    images = Mistral3().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=most)
    assert images.to_dict()["longest_edge"] == edge
    assert images.any_image_sizes()[-1]["N"] <= most


def test_max_visual_without_a_token_is_refused(folder: Path) -> None:
    with pytest.raises(
        ScheduleError, match=r"--max-visual: expected at least 1 \(one token\), got 0; raise it"
    ):
        Mistral3().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=0)


def test_encoder_reduction_is_refused(folder: Path) -> None:
    with pytest.raises(ScheduleError, match="--encoder-keep: expected none for mistral3, got 32"):
        export(folder, encoder_keep=32)


def test_aliases_name_checkpoints_that_are_not_quantized() -> None:
    """The releases without "BF16" in their name hold FP8 weights."""
    for size in (3, 8, 14):
        repository = f"mistralai/Ministral-3-{size}B-Instruct-2512-BF16"
        assert ALIASES[f"ministral-3-{size}b"].repository == repository


def test_fp8_releases_are_refused_by_name(folder: Path) -> None:
    released = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}
    with (
        changed(folder, {"quantization_config": released}),
        pytest.raises(
            CheckpointError,
            match=r"expected awq, gptq, .* got 'fp8'; export the checkpoint that was not quantized",
        ),
    ):
        export(folder)


class changed:  # noqa: N801 -- read as a word
    """The checkpoint in ``folder`` with another config.json, for a while."""

    def __init__(self, folder: Path, change: dict[str, Any], *, file: str = "config.json") -> None:
        self.file, self.original = folder / file, (folder / file).read_text()
        values = json.loads(self.original)
        for name, value in change.items():
            values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
        self.file.write_text(json.dumps(values))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.file.write_text(self.original)


_NO_SCALE = {key: value for key, value in ROPE.items() if key != "llama_4_scaling_beta"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_feature_layer": -2}, "expected vision_feature_layer -1, got -2"),
        ({"vision_feature_layer": [-1, -2]}, r"expected vision_feature_layer -1, got \[-1, -2\]"),
        ({"spatial_merge_size": 3}, "expected spatial_merge_size 1 or 2, got 3"),
        ({"vision_config": {"patch_size": [4, 4]}}, "expected vision patch_size one number"),
        ({"vision_config": {"num_channels": 1}}, "expected vision num_channels 3, got 1"),
        ({"vision_config": {"num_attention_heads": 16}}, "expected vision head_dim 2, a multiple of 4, got 16"),
        ({"vision_config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0}}},
         "expected vision rope_type 'axial'"),
        ({"text_config": {"model_type": "ministral3", "rope_parameters": _NO_SCALE}},
         "expected llama_4_scaling_beta a number, got None"),
        ({"text_config": {"model_type": "ministral3", "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}},
         "expected original_max_position_embeddings a length, got None"),
        ({"text_config": {"model_type": "ministral"}}, "decoder of type mistral, ministral3, got 'ministral'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision tower 'pixtral', got"),
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_cannot_be_followed_are_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    with changed(folder, change), pytest.raises(CheckpointError, match=message):
        Mistral3().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=None)


@pytest.mark.parametrize("change", [{"patch_size": 16}, {"spatial_merge_size": 1}], ids=str)
def test_a_processor_of_another_model_is_refused(folder: Path, change: dict[str, Any]) -> None:
    name = next(iter(change))
    with (
        changed(folder, change, file="processor_config.json"),
        pytest.raises(CheckpointError, match=f"expected {name} .* {change[name]}; make them agree"),
    ):
        Mistral3().image_processing(read_checkpoint(str(folder)), encoder_keep=None, max_visual=None)


def test_a_sliding_window_is_for_sequences_that_fit_it(tmp_path: Path) -> None:
    folder = save_mistral3_checkpoint(tmp_path / "ck")
    with (
        changed(folder, {"text_config": {"sliding_window": 32}}),
        pytest.raises(ScheduleError, match=r"at most 32 positions \(the model's sliding window\)"),
    ):
        export(folder)
