"""Bad input to trio-export: one line on standard error, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click
import pytest

from tests.checkpoints import save_checkpoint
from trio_edge.export.cli import command, main
from trio_edge.export.options import ExportOptions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("source") / "ck", num_layers=3, num_kv_heads=2)


@pytest.fixture
def copy(source: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return shutil.copytree(source, tmp_path / "ck")


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def assert_refused(code: int, error: str, *, expected: str) -> None:
    lines = [line for line in error.splitlines() if line.startswith("trio-export: ")]
    assert code == 2
    assert len(lines) == 1
    assert expected in lines[0]
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["max_images", "max_text", "max_new_tokens", "opset", "dtype"])
def test_help_shows_the_default_of_the_option(name: str) -> None:
    (default,) = (field.default for field in fields(ExportOptions) if field.name == name)
    (option,) = (option for option in command.params if option.name == name)
    assert isinstance(option, click.Option)
    assert f"[default: {default}]" in str(option.help)


FLAGS = {
    "no_model": ([], "expected MODEL"),
    "unknown_model": (["nonsense"], "expected a folder, a Hub id"),
    "malformed_hub_id": (["a/..b--c"], "a/..b--c"),
    "hub_out_of_reach": (["owner/name"], "no connection"),
    "revision_of_a_folder": (["M", "--revision", "v1"], "got 'v1' of"),
    "revision_of_the_packaged_model": (["tiny", "--revision", "v1"], "got 'v1' of tiny"),
    "keep_and_schedule": (["M", "--keep", "20%", "--schedule", "1:5"], "got both"),
    "keep_not_a_number": (["M", "--keep", "many"], "keep 'many'"),
    "keep_zero": (["M", "--keep", "0%"], "keep"),
    "keep_too_small": (["M", "--keep", "1%"], "keep"),
    "schedule_malformed": (["M", "--schedule", "1-5"], "schedule"),
    "stage_at_layer_0": (["M", "--schedule", "0:5"], "layer"),
    "stage_behind_the_last_layer": (["M", "--schedule", "3:5"], "layer"),
    "stages_not_ascending": (["M", "--schedule", "2:9,1:5"], "ascending"),
    "keeps_not_decreasing": (["M", "--schedule", "1:5,2:5"], "keep"),
    "keeps_more_than_there_are": (["M", "--schedule", "1:52"], "keep <= 51"),
    "topk_limit": (["M", "--schedule", "1:4000"], "TensorRT's TopK"),
    "keep_nothing": (["M", "--schedule", "1:0"], "keep"),
    "image_size_malformed": (["M", "--image-size", "640"], "--image-size"),
    "image_size_zero": (["M", "--image-size", "0x10"], "--image-size"),
    "max_text_zero": (["M", "--max-text", "0"], "--max-text"),
    "max_text_beyond_the_model": (["M", "--keep", "50%", "--max-text", "2000"], "positions"),
    "max_new_tokens_negative": (["M", "--max-new-tokens", "-1"], "--max-new-tokens"),
    "opset_too_new": (["M", "--opset", "20"], "--opset: expected 18 or 19, got 20"),
    "opset_too_old": (["M", "--opset", "17"], "--opset: expected 18 or 19, got 17"),
    "unknown_option": (["M", "--nonsense"], "--nonsense"),
    "dtype_is_a_weight_format": (
        ["M", "--dtype", "int4"],
        "--dtype: expected one of auto, float16, float32, got 'int4'; write --quantize int4",
    ),
    "dtype_unknown": (["M", "--dtype", "int3"], "--dtype"),
    "threshold_out_of_range": (["M", "--keep", "50%", "--nms-threshold", "1.5"], "nms_threshold"),
    "rounds_zero": (["M", "--keep", "50%", "--nms-rounds", "0"], "nms_rounds"),
    "encoder_keep_malformed": (["M", "--encoder-keep", "100%"], "--encoder-keep: expected a number or"),
    "encoder_keep_impossible": (["M", "--encoder-keep", "32"], "--encoder-keep"),
    "not_an_integer": (["M", "--max-text", "x"], "--max-text"),
    "text_buckets_malformed": (["M", "--text-buckets", "32;64"], "--text-buckets: expected numbers"),
    "text_bucket_above_max_text": (
        ["M", "--max-text", "64", "--text-buckets", "32,128"],
        "8..64 (--max-text)",
    ),
    "text_bucket_zero": (["M", "--text-buckets", "0"], "--text-buckets"),
    "only_image_sizes_without_any": (["M", "--only-image-sizes"], "expected --image-size with it"),
    "token_method_without_token_keep": (["M", "--token-method", "divprune"], "expected both or none"),
    "token_keep_without_token_method": (["M", "--token-keep", "9"], "expected both or none"),
    "token_keep_malformed": (
        ["M", "--token-method", "divprune", "--token-keep", "x"],
        "--token-keep: expected",
    ),
    "token_keep_of_more_than_there_are": (
        ["M", "--keep", "all", "--token-method", "divprune", "--token-keep", "51"],
        "--token-keep: expected 1..50",
    ),
    "keep_of_more_than_enters": (
        ["M", "--keep", "50%", "--token-method", "divprune", "--token-keep", "9"],
        "--keep: expected at most 17.6%, which is what enters the decoder",
    ),
    "method_unknown": (["M", "--method", "best"], "--method"),
    "keep_impossible_for_the_method": (["M", "--method", "fastv", "--keep", "20%"], "for fastv"),
    "max_visual_for_tiles": (["M", "--max-visual", "100"], "--max-visual: expected none for llava_next"),
}


@pytest.mark.parametrize("name", list(FLAGS))
def test_bad_flag_gives_one_line_and_writes_nothing(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, expected = FLAGS[name]
    arguments = [str(source) if argument == "M" else argument for argument in arguments]
    code, error = run(capsys, *arguments, "--out", tmp_path / "bundle")
    assert_refused(code, error, expected=expected)
    assert list(tmp_path.iterdir()) == []


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(path: Path) -> None:
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config_is_no_json": (lambda folder: (folder / "config.json").write_text("{"), "JSON"),
    "config_is_a_list": (lambda folder: (folder / "config.json").write_text("[1]"), "JSON object"),
    "unknown_architecture": (lambda folder: edit_config(folder, model_type="bert"), "'bert'"),
    "molmo2": (lambda folder: edit_config(folder, model_type="molmo2"), "'molmo2'; this"),
    "minicpm_v_4_7": (lambda folder: edit_config(folder, model_type="minicpmv4_7"), "'minicpmv4_7'; this"),
    "minicpm_ocr": (lambda folder: edit_config(folder, model_type="minicpm_ocr"), "'minicpm_ocr'; this"),
    "remote_code": (lambda folder: edit_config(folder, auto_map={"AutoModel": "x.Y"}), "remote code"),
    "quantized": (lambda folder: edit_config(folder, quantization_config={"bits": 4}), "quantized"),
    "wrong_sizes": (
        lambda folder: edit_config(
            folder,
            text_config={
                **json.loads((folder / "config.json").read_text())["text_config"],
                "hidden_size": 32,
            },
        ),
        "expected shape",
    ),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "pickled_weights": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickled",
    ),
    "truncated_weights": (lambda folder: truncate(folder / "model.safetensors"), "complete safetensors"),
    "empty_weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "complete safetensors"),
    "huge_header": (lambda folder: huge_header(folder / "model.safetensors"), "complete safetensors"),
    "missing_shard": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "b.safetensors"}}'
        ),
        "shard",
    ),
    "shard_outside": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../b.safetensors"}}'
        ),
        "expected safetensors files inside the checkpoint",
    ),
    "no_tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "tokenizer",
    ),
    "no_processor": (lambda folder: (folder / "processor_config.json").unlink(), "image processor"),
}


@pytest.mark.parametrize("name", list(BREAKAGES))
def test_broken_checkpoint_gives_one_line_and_writes_nothing(
    name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breakage, expected = BREAKAGES[name]
    breakage(copy)
    code, error = run(capsys, copy, "--schedule", "1:9", "--max-text", "32", "--out", tmp_path / "bundle")
    assert_refused(code, error, expected=expected)
    assert [path.name for path in tmp_path.iterdir()] == ["ck"]


def test_missing_tensor_is_named(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    del tensors[name]
    save_file(tensors, copy / "model.safetensors")
    code, error = run(capsys, copy, "--schedule", "1:9", "--out", tmp_path / "bundle")
    assert_refused(code, error, expected="language_model.layers.1.mlp.up_proj.weight")


def test_a_missing_head_is_answered_with_the_setting_that_says_where_it_is(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("lm_head.weight"))]
    save_file(tensors, copy / "model.safetensors")
    code, error = run(capsys, copy, "--schedule", "1:9", "--out", tmp_path / "bundle")
    assert_refused(code, error, expected="set tie_word_embeddings in config.json to true")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}, "a choice inside a repeat"),
        (
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a" * 999}] * 4},
            "added tokens longer",
        ),
    ],
    ids=["pattern", "growth"],
)
def test_a_tokenizer_that_could_hang_or_end_the_runtime_is_refused(
    rule: dict[str, Any], expected: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads((copy / "tokenizer.json").read_bytes())
    (copy / "tokenizer.json").write_text(json.dumps(content | {"normalizer": rule}))
    code, error = run(capsys, copy, "--schedule", "1:9", "--out", tmp_path / "bundle")
    assert_refused(code, error, expected=expected)


def test_existing_output_is_kept_without_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine.txt").write_text("mine")
    code, error = run(capsys, source, "--out", tmp_path / "bundle")
    assert_refused(code, error, expected="--force")
    code, error = run(capsys, source, "--out", tmp_path / "bundle", "--force")
    assert_refused(code, error, expected="folder of other files")
    assert (tmp_path / "bundle" / "mine.txt").read_text() == "mine"


def test_list_names_the_aliases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    output = capsys.readouterr().out
    assert "llava-hf/llava-v1.6-vicuna-7b-hf" in output
    assert "tiny" in output


def test_the_option_list_changes_only_on_purpose() -> None:
    options = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    assert options == {
        "--out", "--revision", "--keep", "--schedule", "--level", "--method", "--probe-rows", "--num-probe-rows",
        "--token-method", "--token-keep", "--clip", "--nms-threshold", "--nms-rounds", "--positions", "--encoder-keep",
        "--image-size", "--only-image-sizes", "--pad-images", "--min-visual", "--max-visual", "--max-images",
        "--max-frames", "--budget", "--follow-ups", "--max-text", "--text-buckets", "--max-new-tokens", "--decode-rows",
        "--batch", "--outputs",
        "--dtype", "--quantize", "--opset", "--target", "--force", "--list", "--quiet",
    }  # fmt: skip
