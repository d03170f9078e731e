"""Generation settings of a checkpoint: a keep-all bundle gives the tokens of Hugging Face's ``generate()`` with each of them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch

from tests.bundles import export
from tests.pictures import random_picture
from tests.qwen_checkpoints import CAMERA, hugging_face_inputs, save_qwen_checkpoint
from tests.shared_traces import shared_traces
from trio_edge.export.bundle import export_bundle
from trio_edge.export.checkpoints.checkpoint import read_checkpoint
from trio_edge.export.checkpoints.text_files import read_generation
from trio_edge.export.options import ExportOptions, Progress
from trio_edge.runtime.bundle.errors import CheckpointError, PromptTooLongError, ShapeError
from trio_edge.runtime.bundle.generation import GenerationSettings
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from trio_edge.runtime.bundle.manifest import Manifest

NUM_STEPS = 20
PROMPTS = ["w1 w2 w3", "w5 w4 w3 w2 w1 w0 w7 w7"]
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "qwen2.5-vl": {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-06},
    "penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "no word twice": {"no_repeat_ngram_size": 1},
    "no pair twice": {"no_repeat_ngram_size": 2},
    "no triple twice": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
    "at least some new tokens": {"min_new_tokens": 12},
    "at least so long": {"min_length": 30},
    "suppressed": {"suppress_tokens": [3, 9, 17, 40], "begin_suppress_tokens": [5, 60]},
    "forced end": {"forced_eos_token_id": 86},
    "two forced ends": {"forced_eos_token_id": [86, 88], "repetition_penalty": 1.3},
}

LIMITS: dict[str, dict[str, Any]] = {
    "new tokens": {"max_new_tokens": 5},
    "new tokens before the whole length": {"max_new_tokens": 6, "max_length": 7},
    "whole length": {"max_length": 45},
    "forced end at the limit": {"forced_eos_token_id": 86, "max_new_tokens": 4},
    "more than the bundle has room for": {"max_new_tokens": 1000},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen_checkpoint(tmp_path_factory.mktemp("settings") / "ck", num_layers=2)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    return export(folder, schedule=Schedule(positions="preserved"), image_sizes=(CAMERA,))


def with_settings(bundle: Path, copy: Path, settings: dict[str, Any], checkpoint: Path) -> Path:
    """Return a copy of the bundle with what the exporter reads from ``settings``."""
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    found = read_generation(read_checkpoint(str(checkpoint)))
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "trio.json").read_text())
    manifest["generation"] = msgspec.to_builtins(found)
    (copy / "trio.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("name", SETTINGS)
def test_a_bundle_follows_what_its_checkpoint_wants(
    name: str, model: Any, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    copy = with_settings(bundle, tmp_path / "bundle", SETTINGS[name], checkpoint)
    with Pipeline.from_bundle(copy) as pipeline:
        for size, prompt in zip([CAMERA, None, (61, 59)], [*PROMPTS, PROMPTS[0]]):
            picture = None if size is None else random_picture(*size, seed=size[0])
            inputs = hugging_face_inputs(pipeline, picture, prompt)
            model.model.rope_deltas = None
            output = model.generate(
                **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=NUM_STEPS,
                eos_token_id=list(pipeline.manifest.text.stop_token_ids), pad_token_id=0, **SETTINGS[name],
            )  # fmt: skip
            answer = pipeline.generate(picture, prompt, max_new_tokens=NUM_STEPS)
            assert answer.text is not None
            assert answer.token_ids == output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", LIMITS)
def test_answers_end_where_the_checkpoint_says_unless_the_bundle_or_the_user_says_less(
    name: str, model: Any, bundle: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    copy = with_settings(bundle, tmp_path / "bundle", LIMITS[name], checkpoint)
    with Pipeline.from_bundle(copy) as pipeline:
        room = pipeline.manifest.max_new_tokens
        for picture, prompt in ((random_picture(*CAMERA), PROMPTS[0]), (None, PROMPTS[1])):
            inputs = hugging_face_inputs(pipeline, picture, prompt)
            model.model.rope_deltas = None
            output = model.generate(
                **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), eos_token_id=[999_999], pad_token_id=0,
                **{**LIMITS[name], **({"max_new_tokens": room} if "more" in name else {})},
            )  # fmt: skip
            theirs = output[0, inputs["input_ids"].shape[1] :].tolist()
            pipeline.manifest = without_stops(pipeline.manifest)
            answer = pipeline.generate(picture, prompt)
            assert answer.text is not None
            assert answer.token_ids == theirs[:room]
            asked = pipeline.generate(picture, prompt, max_new_tokens=2)
            assert (asked.text, asked.statistics.new_tokens)[1] == 2


def without_stops(manifest: Manifest) -> Manifest:
    """Return the manifest of a bundle whose answers end only at a limit."""
    return msgspec.structs.replace(manifest, text=msgspec.structs.replace(manifest.text, stop_token_ids=()))


def test_a_prompt_longer_than_the_checkpoints_whole_length_is_refused_unless_a_limit_is_given(
    bundle: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    copy = with_settings(bundle, tmp_path / "bundle", {"max_length": 9}, checkpoint)
    with Pipeline.from_bundle(copy) as pipeline:
        with pytest.raises(
            PromptTooLongError, match=r"fewer than 9 tokens \(max_length .*; shorten it, or give"
        ):
            pipeline.generate(random_picture(*CAMERA), PROMPTS[0])
        assert pipeline.generate(random_picture(*CAMERA), PROMPTS[0], max_new_tokens=3).text is not None


def test_a_limit_above_the_bundles_is_told_at_export(folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    (checkpoint / "generation_config.json").write_text(json.dumps({"max_new_tokens": 17}))
    told: list[str] = []
    for room in (16, 17):
        options = ExportOptions(
            model=str(checkpoint),
            out=tmp_path / str(room),
            schedule=Schedule(positions="preserved"),
            image_sizes=(CAMERA,),
            max_text=64,
            max_new_tokens=room,
        )
        with shared_traces():
            export_bundle(options, progress=Progress(warn=told.append))
    (line,) = told
    assert "max_new_tokens: expected at most 16 (--max-new-tokens), got 17" in line


def test_each_setting_changes_the_answer_or_its_end(bundle: Path, folder: Path, tmp_path: Path) -> None:
    """Else the test above would pass without it."""
    answers = {}
    for name, settings in SETTINGS.items():
        checkpoint = shutil.copytree(folder, tmp_path / f"{name} ck")
        copy = with_settings(bundle, tmp_path / name, settings, checkpoint)
        with Pipeline.from_bundle(copy) as pipeline:
            found = [
                pipeline.generate(random_picture(*CAMERA), prompt, max_new_tokens=NUM_STEPS)
                for prompt in PROMPTS
            ]
            answers[name] = [(answer.text, tuple(answer.token_ids))[1] for answer in found]
    same = [name for name, tokens in answers.items() if tokens == answers["none"]]
    assert set(same) <= {"none", "qwen2.5-vl", "at least some new tokens", "at least so long"}


def test_a_user_overrides_the_checkpoint(bundle: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    wanted = {
        "do_sample": True,
        "temperature": 2.0,
        "top_k": 0,
        "repetition_penalty": 1.7,
        "no_repeat_ngram_size": 2,
    }
    copy = with_settings(bundle, tmp_path / "bundle", wanted, checkpoint)
    picture = random_picture(*CAMERA)
    with Pipeline.from_bundle(bundle) as plain, Pipeline.from_bundle(copy) as pipeline:
        plain_answer = plain.generate(picture, PROMPTS[0], max_new_tokens=NUM_STEPS)
        off = {"temperature": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        answer = pipeline.generate(picture, PROMPTS[0], max_new_tokens=NUM_STEPS, **off)
        assert (answer.text, answer.token_ids) == (plain_answer.text, plain_answer.token_ids)
        drawn = {
            pipeline.generate(picture, PROMPTS[0], max_new_tokens=5, seed=seed).text for seed in range(4)
        }
        assert len(drawn) > 1
        again = [pipeline.generate(picture, PROMPTS[0], max_new_tokens=5, seed=7).text for _ in range(2)]
        assert again[0] == again[1]


@pytest.mark.parametrize(
    "override",
    [{"repetition_penalty": 0.0}, {"repetition_penalty": "2"}, {"no_repeat_ngram_size": -1}, {"min_new_tokens": 1.5},
     {"min_new_tokens": True}, {"repetition_penalty": float("nan")}],
    ids=str,
)  # fmt: skip
def test_overrides_out_of_range_are_refused(override: dict[str, Any], bundle: Path) -> None:
    with (
        Pipeline.from_bundle(bundle) as pipeline,
        pytest.raises(ShapeError, match=f"^{next(iter(override))}: exp"),
    ):
        pipeline.generate(None, "w1", **override)


def test_rules_that_leave_no_token_are_one_line(bundle: Path) -> None:
    with Pipeline.from_bundle(bundle) as pipeline:
        vocabulary = pipeline.manifest.dimensions.vocab_size
        nothing = msgspec.structs.replace(GenerationSettings(), suppress_tokens=tuple(range(vocabulary)))
        pipeline.manifest = msgspec.structs.replace(pipeline.manifest, generation=nothing)
        with pytest.raises(ShapeError, match="expected at least one token that may come next, got none"):
            _ = pipeline.generate(None, "w1").text


@pytest.mark.parametrize("has_file", [True, False], ids=["generation_config.json", "without"])
def test_settings_in_the_models_configuration_count_only_without_a_file_of_their_own(
    has_file: bool, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    config = json.loads((checkpoint / "config.json").read_text())
    config["text_config"] |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_length": 20}
    (checkpoint / "config.json").write_text(json.dumps(config))
    if not has_file:
        (checkpoint / "generation_config.json").unlink()
    found = read_generation(read_checkpoint(str(checkpoint)))
    theirs = AutoModelForImageTextToText.from_pretrained(checkpoint).generation_config
    assert found.repetition_penalty == (theirs.repetition_penalty or 1.0) == (1.0 if has_file else 1.5)
    assert found.no_repeat_ngram_size == (theirs.no_repeat_ngram_size or 0) == (0 if has_file else 2)
    assert found.max_length is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "quantized"}, "cache_implementation: expected none, got 'quantized'"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences: expected none, got 2"),
        ({"num_beams": 4}, "num_beams: expected none, got 4"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids: expected none, got \[\[3\]\]"),
        ({"do_sample": True, "min_p": 0.1}, "min_p: expected none, got 0.1"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty: expected none, got 1.2"),
        (
            {"max_new_tokens": 0},
            r"expected generation settings in range, got 'Expected `int` >= 1 - at `\$.max_new",
        ),
        ({"max_length": "\ud800"}, "expected generation settings in range"),
        ({"max_length": 7.5}, "expected generation settings in range"),
        ({"do_sample": True, "top_p": 1.5}, "generation settings"),
        ({"repetition_penalty": -1.0}, "expected generation settings in range"),
        ("not an object", "expected a JSON object"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: Any, message: str, folder: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read_generation(read_checkpoint(str(checkpoint)))


def test_settings_of_sampling_say_nothing_where_nothing_is_sampled(folder: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folder, tmp_path / "ck")
    values = {"do_sample": False, "temperature": 0.7, "top_k": 20, "min_p": 0.1, "eos_token_id": 86}
    (checkpoint / "generation_config.json").write_text(json.dumps(values))
    assert read_generation(read_checkpoint(str(checkpoint))) == GenerationSettings()


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "3", [1]], ids=str)
def test_a_number_of_tokens_that_is_none_is_refused(count: Any, bundle: Path) -> None:
    with (
        Pipeline.from_bundle(bundle) as pipeline,
        pytest.raises(ShapeError, match=r"max_new_tokens: expected 1\.\.40"),
    ):
        pipeline.generate(None, "w1", max_new_tokens=count)


@pytest.mark.parametrize("prompt", [None, 3, b"w1", ["w1"]], ids=str)
def test_a_prompt_that_is_no_text_is_refused(prompt: Any, bundle: Path) -> None:
    with (
        Pipeline.from_bundle(bundle) as pipeline,
        pytest.raises(ShapeError, match="prompt: expected text, got"),
    ):
        pipeline.generate(None, prompt)
