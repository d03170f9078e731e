"""Decoders as checkpoints configure them: each gives Hugging Face's tokens through exported graphs, in one bundle each."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bundles import export
from tests.checkpoints import make_tokenizer, save_checkpoint
from tests.hugging_face import Original
from tests.pictures import random_picture
from tests.spec.reduced_reference import reduced_logits
from tests.tolerances import LOGITS_FLOAT32
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.checkpoints.text_files import read_text_files
from trio_edge.export.families import family_of
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

PICTURE = (70, 40)
PROMPT = "w1 w2 w3"
NUM_STEPS = 6
NEEDED = 51 + 64 + 40
"""Positions of the longest sequence of these bundles: visual, text and new tokens."""

VARIANTS: dict[str, dict[str, Any]] = {
    "llama3_rope-large_heads-mistral_window": {
        "text": "mistral",
        "text_settings": {
            "head_dim": 24,
            "sliding_window": NEEDED,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "dynamic_rope-qwen2_biases_and_windows": {
        "text": "qwen2",
        "random_biases": True,
        "text_settings": {
            "use_sliding_window": True,
            "sliding_window": NEEDED,
            "max_window_layers": 1,
            "max_position_embeddings": NEEDED,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
}
REDUCED_VARIANT: dict[str, Any] = {
    "random_biases": True,
    "text_settings": {
        "head_dim": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def answers_agree(checkpoint: Path, pipeline: Pipeline, *, num_tokens: int) -> list[int]:
    """Compare tokens and first logits with Hugging Face's own generate, and return the tokens."""
    original = Original.load(checkpoint)
    picture = random_picture(*PICTURE, seed=3)
    pixels = pipeline.images.prepare(picture)["pixel_values"]
    tokens, logits = original.generate(
        picture, original.render(PROMPT), num_tokens=num_tokens, pixel_values=pixels
    )
    answer = pipeline.generate(picture, PROMPT, max_new_tokens=num_tokens)
    _ = answer.text
    assert answer.token_ids == tokens
    np.testing.assert_allclose(answer.first_logits, logits[0], **LOGITS_FLOAT32)
    return tokens


@pytest.mark.parametrize("name", list(VARIANTS))
def test_variant_gives_the_tokens_of_hugging_face(name: str, tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=2, seed=7, **VARIANTS[name])
    with Pipeline.from_bundle(export(checkpoint, tmp_path / "bundle")) as pipeline:
        answers_agree(checkpoint, pipeline, num_tokens=NUM_STEPS)


def test_yarn_small_heads_and_biases_keep_the_tokens_of_plain_torch(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "ck", num_layers=3, seed=9, **REDUCED_VARIANT)
    schedule = Schedule(stages=(Stage(layer=1, keep=12),))
    original = Original.load(checkpoint)
    assert original.model.model.language_model.rotary_emb.attention_scaling > 1.1
    with Pipeline.from_bundle(export(checkpoint, tmp_path / "bundle", schedule=schedule)) as pipeline:
        picture = random_picture(*PICTURE, seed=3)
        answer = pipeline.generate(picture, PROMPT, max_new_tokens=1)
        _ = answer.text
        pixels = pipeline.images.prepare(picture)["pixel_values"]
    inputs = original.processor(images=picture, text=original.render(PROMPT), return_tensors="pt")
    with torch.no_grad():
        features = original.model.get_image_features(
            torch.from_numpy(pixels)[None], image_sizes=inputs["image_sizes"]
        ).pooler_output[0]
        embeds = original.model.get_input_embeddings()(inputs["input_ids"])
    spots = inputs["input_ids"][0] == original.model.config.image_token_id
    embeds[0, spots] = features
    logits, kept = reduced_logits(original.model, embeds, schedule, visual=spots.nonzero()[:, 0].tolist())
    assert [indices.tolist() for indices in answer.kept] == kept
    np.testing.assert_allclose(answer.first_logits, logits.numpy(), **LOGITS_FLOAT32)


@pytest.fixture(scope="module")
def old_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied embeddings with spare rows, RoPE settings in their old places, stop tokens in the decoder's configuration."""
    checkpoint = save_checkpoint(
        tmp_path_factory.mktemp("old") / "ck",
        family="llava",
        num_layers=2,
        tie=True,
        seed=8,
        text_settings={
            "vocab_size": 112,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
        },
    )
    config = json.loads((checkpoint / "config.json").read_text())
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").unlink()
    return checkpoint


@pytest.fixture(scope="module")
def old_bundle(old_checkpoint: Path) -> Path:
    return export(old_checkpoint, old_checkpoint.parent / "bundle")


def test_tied_spare_rows_and_old_rope_settings_give_the_tokens_of_hugging_face(
    old_checkpoint: Path, old_bundle: Path
) -> None:
    with Pipeline.from_bundle(old_bundle) as pipeline:
        assert pipeline.manifest.dimensions.vocab_size == 112
        answers_agree(old_checkpoint, pipeline, num_tokens=NUM_STEPS)


def test_tied_embeddings_are_stored_once_for_table_and_head(old_checkpoint: Path, old_bundle: Path) -> None:
    import onnx

    with Pipeline.from_bundle(old_bundle) as pipeline:
        table = pipeline.manifest.token_embedding
    head = onnx.load(old_bundle / "head.onnx", load_external_data=False)
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in head.graph.initializer]
    assert {"location": table.file, "offset": str(table.offset)}.items() <= next(
        place.items() for place in places if place.get("offset") == str(table.offset)
    )
    stored = sum(path.stat().st_size for path in (old_bundle / "weights").iterdir())
    assert stored <= (old_checkpoint / "model.safetensors").stat().st_size


def test_stored_head_counts_more_than_the_tied_setting_as_in_transformers(
    old_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(old_checkpoint, tmp_path / "ck")
    tensors = load_file(copy / "model.safetensors")
    (table,) = [name for name in tensors if "embed_tokens" in name]
    tensors["lm_head.weight"] = 2.0 * tensors[table]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    model = Original.load(copy).model
    assert torch.equal(model.lm_head.weight, 2.0 * model.get_input_embeddings().weight)
    for folder, is_tied in ((old_checkpoint, True), (copy, False)):
        found = read_checkpoint(str(folder))
        assert family_of(folder, found.config).read_config(found).tie_word_embeddings == is_tied


def test_every_stop_token_of_the_generation_config_ends_the_answer(
    old_checkpoint: Path, old_bundle: Path, tmp_path: Path
) -> None:
    with Pipeline.from_bundle(old_bundle) as pipeline:
        assert pipeline.manifest.text.stop_token_ids == (2,)  # from the decoder's configuration
        tokens = answers_agree(old_checkpoint, pipeline, num_tokens=NUM_STEPS)
    copy = shutil.copytree(old_checkpoint, tmp_path / "ck")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, tokens[3]]}))
    stops = read_text_files(read_checkpoint(str(copy)), default_template="").spec.stop_token_ids
    bundle = shutil.copytree(old_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "trio.json").read_text())
    manifest["text"]["stop_token_ids"] = stops
    (bundle / "trio.json").write_text(json.dumps(manifest))
    with Pipeline.from_bundle(bundle) as pipeline:
        stopped = answers_agree(copy, pipeline, num_tokens=NUM_STEPS)
    assert stopped == tokens[: tokens.index(tokens[3]) + 1]


@pytest.mark.parametrize(
    ("generation", "top", "text"),
    [
        (None, None, 7),
        (None, 9, 7),
        ({}, 9, 7),
        ({"eos_token_id": None}, 9, 7),
        ({"eos_token_id": [3, 4]}, 9, 7),
    ],
)
def test_what_ends_an_answer_is_what_ends_hugging_faces(
    generation: dict[str, Any] | None, top: int | None, text: int, old_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(old_checkpoint, tmp_path / "ck")
    config = json.loads((copy / "config.json").read_text())
    config["eos_token_id"], config["text_config"]["eos_token_id"] = top, text
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (copy / "generation_config.json").write_text(json.dumps(generation))
    expected = Original.load(copy).model.generation_config.eos_token_id
    stops = read_text_files(read_checkpoint(str(copy)), default_template="").spec.stop_token_ids
    assert list(stops) == ([] if expected is None else expected if isinstance(expected, list) else [expected])


def test_tokenizer_with_more_tokens_than_the_embedding_table_is_refused(
    old_checkpoint: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(old_checkpoint, tmp_path / "ck")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"added{index}" for index in range(20)])
    tokenizer.save_pretrained(copy)
    with pytest.raises(CheckpointError, match=r"expected token ids below 112 .* got 119 for 'added19'"):
        read_text_files(read_checkpoint(str(copy)), default_template="")


@pytest.mark.parametrize("text", ["mistral", "llama"])
def test_window_that_would_bind_is_refused_before_anything_is_written(text: Any, tmp_path: Path) -> None:
    """Llama's mask has no window, but the cache of Hugging Face's model drops what is before it."""
    checkpoint = save_checkpoint(
        tmp_path / "ck", text=text, num_layers=1, text_settings={"sliding_window": NEEDED - 1}
    )
    with pytest.raises(
        ScheduleError, match=rf"at most {NEEDED - 1} positions \(the model's sliding window\)"
    ):
        export(checkpoint, tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]
