"""trio-run and trio-inspect: what they print, and one line for everything a user can do wrong."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.pictures import random_picture
from trio_edge.runtime import pipeline as pipeline_module
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.cli import run as cli_run
from trio_edge.runtime.images import reading
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    random_picture(48, 48).save(path)
    return path


@pytest.fixture
def copy(reduced_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return shutil.copytree(reduced_bundle, tmp_path / "bundle")


def assert_refused(
    main: Callable[[list[str]], int], arguments: list[Any], capsys: Any, *, expected: str
) -> None:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2
    assert len(captured.err.strip().splitlines()) == 1
    assert expected in captured.err
    assert "Traceback" not in captured.err


def test_an_answer_is_printed_with_its_visual_tokens(
    reduced_bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_run.main([str(reduced_bundle), "--image", str(picture), "--prompt", "w1 w2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "visual tokens: 51 in, 23.7 kept on average (46.4 %)"


def test_show_kept_draws_a_panel_for_each_stage(reduced_bundle: Path, picture: Path, tmp_path: Path) -> None:
    drawing = tmp_path / "kept.png"
    arguments = [str(reduced_bundle), "--image", str(picture), "--prompt", "w1", "--show-kept", str(drawing)]
    assert cli_run.main(arguments) == 0
    with Image.open(drawing) as image:
        assert image.width > 2 * 100


def test_an_image_that_is_drawn_is_read_once(
    reduced_bundle: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []

    def open_image(source: Path, **settings: Any) -> Image.Image:
        read.append(source)
        return original(source, **settings)

    original = reading.open_image
    for module in (reading, pipeline_module):
        monkeypatch.setattr(module, "open_image", open_image)
    arguments = [str(reduced_bundle), "--image", str(picture), "--prompt", "w1"]
    assert cli_run.main([*arguments, "--show-kept", str(tmp_path / "kept.png")]) == 0
    assert read == [picture]


def test_answers_that_a_terminal_may_not_show_are_escaped_there_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = "a\x1b[31m\u202eb\n\t"
    assert cli_run._shown(text) == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert cli_run._shown(text) == "a\\x1b[31m\\u202eb\n\t"


def test_compare_full_prints_both_answers_and_ratios(
    reduced_bundle: Path, keep_all_bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(reduced_bundle),
        "--image",
        str(picture),
        "--prompt",
        "w1",
        "--compare-full",
        str(keep_all_bundle),
    ]
    assert cli_run.main(arguments) == 0
    output = capsys.readouterr().out
    assert "keep-all answer:" in output
    assert "KL of the first token:" in output
    assert "KV bytes" in output


def test_compare_full_of_a_bundle_with_itself_has_no_divergence(
    keep_all_bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(keep_all_bundle),
        "--image",
        str(picture),
        "--prompt",
        "w1",
        "--compare-full",
        str(keep_all_bundle),
    ]
    assert cli_run.main(arguments) == 0
    assert "KL of the first token: 0.0000 nats" in capsys.readouterr().out


REQUESTS: dict[str, tuple[list[str], str]] = {
    "missing_picture": (["--image", "nowhere.png", "--prompt", "w1"], "nowhere.png"),
    "address": (
        ["--image", "https://a.example/b.png", "--prompt", "w1"],
        "got a URL, and no address is read",
    ),
    "two_pictures": (["--image", "P", "--image", "P", "--prompt", "w1"], "images: expected at most"),
    "no_prompt": (["--image", "P"], "--prompt"),
    "empty_prompt": (["--image", "P", "--prompt", " "], "--prompt: expected a question, got no words"),
    "empty_text_picture": (["--image", "EMPTY", "--prompt", "w1"], "expected"),
    "not_a_picture": (["--image", "TEXT", "--prompt", "w1"], "expected"),
    "prompt_too_long": (["--prompt", "w1 " * 100], "largest bucket"),
    "image_token_in_prompt": (["--image", "P", "--prompt", "<image> w1"], "special token"),
    "end_token_in_prompt": (["--prompt", "w1 </s> w2"], "special token"),
    "too_many_new_tokens": (["--prompt", "w1", "--max-new-tokens", "1000"], "max_new_tokens"),
    "zero_new_tokens": (["--prompt", "w1", "--max-new-tokens", "0"], "max_new_tokens"),
    "negative_temperature": (["--prompt", "w1", "--temperature", "-1"], "temperature"),
    "top_p_zero": (["--prompt", "w1", "--temperature", "1", "--top-p", "0"], "top_p"),
    "unknown_backend": (["--prompt", "w1", "--backend", "abacus"], "backend"),
    "show_kept_without_picture": (["--prompt", "w1", "--show-kept", "x.png"], "--image"),
    "show_kept_with_odd_suffix": (["--image", "P", "--prompt", "w1", "--show-kept", "x.doc"], "--show-kept"),
    "show_kept_nowhere": (["--image", "P", "--prompt", "w1", "--show-kept", "no/such/x.png"], "--show-kept"),
    "compare_with_a_reduced_bundle": (["--prompt", "w1", "--compare-full", "B"], "keep-all bundle"),
    "compare_with_nothing": (["--prompt", "w1", "--compare-full", "no/such"], "no/such: expected a bundle"),
    "null_byte": (["--prompt", "w\0"], "null byte"),
    "half_a_character": (["--prompt", "w1", "--image", "\ud800"], "half a character"),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_bad_request_gives_one_line(
    name: str, reduced_bundle: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    places = {
        "P": picture,
        "EMPTY": tmp_path / "empty.png",
        "TEXT": tmp_path / "text.png",
        "B": reduced_bundle,
    }
    arguments, expected = REQUESTS[name]
    code = cli_run.main(
        [str(reduced_bundle), *(str(places.get(argument, argument)) for argument in arguments)]
    )
    errors = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith("trio-run: ")
    assert expected in errors[0]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "trio.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def link_elsewhere(folder: Path) -> None:
    outside = folder.parent / "outside.onnx"
    (folder / "head.onnx").rename(outside)
    (folder / "head.onnx").symlink_to(outside)


def escape_by_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "trio.json").read_text())
    manifest["files"][0]["path"] = "../outside.onnx"
    (folder / "trio.json").write_text(json.dumps(manifest))


def test_an_answer_without_words_says_so(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle ends an answer at the token that was the first one of another."""
    with Pipeline.from_bundle(copy) as pipeline:
        answer = pipeline.generate((), "w1", max_new_tokens=1)
        assert answer.text
    text = json.loads((copy / "trio.json").read_text())["text"]
    edit_manifest(copy, text={**text, "stop_token_ids": answer.token_ids})
    assert cli_run.main([str(copy), "--prompt", "w1"]) == 0
    assert "trio-run: the answer has no words" in capsys.readouterr().err


def test_a_prompt_of_unknown_words_is_told_with_the_size_of_the_vocabulary(
    reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "--prompt: expected some of the"
    assert cli_run.main([str(reduced_bundle), "--prompt", "what is this"]) == 0
    assert f"{remark} 100 words that the model knows, got none" in capsys.readouterr().err
    assert cli_run.main([str(reduced_bundle), "--prompt", "what is w1"]) == 0
    assert remark not in capsys.readouterr().err


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no_folder": (shutil.rmtree, "expected a bundle folder"),
    "no_manifest": (lambda folder: (folder / "trio.json").unlink(), "did not finish"),
    "manifest_is_no_json": (lambda folder: (folder / "trio.json").write_text("{"), "expected JSON"),
    "manifest_is_a_list": (lambda folder: (folder / "trio.json").write_text("[]"), "schema_version"),
    "other_schema": (lambda folder: edit_manifest(folder, schema_version=9), "schema_version 9"),
    "unknown_key": (lambda folder: edit_manifest(folder, surprise=1), "surprise"),
    "wrong_type": (lambda folder: edit_manifest(folder, max_visual="many"), "max_visual"),
    "another_folder": (empty, "this is no bundle, name a folder that trio-export wrote"),
    "missing_graph": (lambda folder: (folder / "head.onnx").unlink(), "head.onnx"),
    "changed_byte_in_graph": (lambda folder: flip_byte(folder / "prefix.onnx"), "SHA-256"),
    "changed_byte_in_weights": (
        lambda folder: flip_byte(folder / "weights" / "model.safetensors"),
        "SHA-256",
    ),
    "truncated_graph": (
        lambda folder: (folder / "select_1.onnx").write_bytes((folder / "select_1.onnx").read_bytes()[:99]),
        "bytes",
    ),
    "link_to_elsewhere": (link_elsewhere, "refused"),
    "path_outside": (escape_by_manifest, "inside the bundle"),
    "no_tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
}


@pytest.mark.parametrize("main", [cli_run.main, cli_inspect.main], ids=["trio-run", "trio-inspect"])
@pytest.mark.parametrize("name", list(BREAKAGES))
def test_broken_bundle_gives_one_line(
    name: str, main: Callable[[list[str]], int], copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    breakage, expected = BREAKAGES[name]
    breakage(copy)
    arguments = [copy, "--prompt", "w1"] if main is cli_run.main else [copy]
    assert_refused(main, arguments, capsys, expected=expected)


def test_a_graph_that_is_not_the_manifests_is_refused(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Right sizes and hashes, but the manifest promises other tensors."""
    manifest = json.loads((copy / "trio.json").read_text())
    manifest["graphs"][0]["inputs"][0]["name"] = "other"
    (copy / "trio.json").write_text(json.dumps(manifest))
    assert_refused(cli_run.main, [copy, "--prompt", "w1"], capsys, expected="export the bundle again")


def test_inspect_prints_json_with_the_average_keep_as_a_fraction(
    reduced_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_inspect.main([str(reduced_bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["average_keep"] == pytest.approx((51 + 14 + 6) / (3 * 51))
    assert [graph["name"] for graph in facts["graphs"]] == [
        "vision", "prefix", "select_1", "segment_1", "select_2", "suffix", "head",
    ]  # fmt: skip
    assert facts["flops"]["ratio"] > 1
    assert facts["kv"]["ratio"] > 1


def test_inspect_prints_tables(reduced_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_inspect.main([str(reduced_bundle), "--io", "--verify"]) == 0
    output = capsys.readouterr().out
    assert "average keep" in output
    assert "46.4 %" in output
