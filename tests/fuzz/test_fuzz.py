"""Inputs that once broke something, row by row, and a bounded run of everything; ``make fuzz`` runs hundreds of thousands."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from tests.fuzz.commands import run_command
from tests.fuzz.kinds import KINDS
from tests.fuzz.run import run
from tests.fuzz.subject import is_clear
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.export import cli as cli_export
from trio_edge.profiling import cli as cli_profile
from trio_edge.runtime.bundle.errors import BundleError, ManifestError, TrioEdgeError
from trio_edge.runtime.bundle.reader import open_bundle, sha256_of
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.cli import run as cli_run
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.runtime.prompts.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

LONG = "n" * 300
NUM_INPUTS = 1000


@pytest.fixture
def copy(reduced_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return shutil.copytree(reduced_bundle, tmp_path / "bundle")


def test_no_input_ends_in_anything_but_an_answer_or_one_line(reduced_bundle: Path) -> None:
    counts, findings = run(reduced_bundle, inputs=range(NUM_INPUTS), processes=1)
    assert findings == []
    assert sum(counts.values()) == NUM_INPUTS
    assert {kind for kind, _ in counts} == set(KINDS)
    assert sum(number for (_, end), number in counts.items() if end in ("ok", "same")) > 20  # some get far


def test_every_kind_has_a_share_and_all_are_run() -> None:
    assert sum(share for share, _ in KINDS.values()) == 1000
    assert KINDS["command"][1] is run_command


# Files of a bundle


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _gigabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 42)


@pytest.mark.parametrize("make", [_pipe, _endless_device, _link_to_itself, _gigabytes, Path.mkdir])
@pytest.mark.parametrize("name", ["trio.json", "prefix.onnx", "tokenizer.json", "chat_template.jinja"])
def test_what_is_no_regular_file_is_refused_at_once(
    name: str, make: Callable[[Path], None], copy: Path
) -> None:
    (copy / name).unlink()
    make(copy / name)
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert is_clear(str(caught.value))


def _seal(bundle: Path, name: str, content: bytes) -> None:
    """Change a file and make its hash right again."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "trio.json").read_bytes())
    for entry in manifest["files"]:
        if entry["path"] == name:
            entry |= {"num_bytes": len(content), "sha256": sha256_of(bundle / name)}
    (bundle / "trio.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "wrong", [{"length": "0"}, {"offset": "-1"}, {"location": "../x"}, {"location": "trio.json"}]
)
def test_weights_of_a_graph_lie_inside_the_bundle_as_many_as_their_shape_says(
    wrong: dict[str, str], copy: Path
) -> None:
    import onnx

    graph = onnx.load(copy / "prefix.onnx", load_external_data=False)
    tensor = next(tensor for tensor in graph.graph.initializer if tensor.external_data)
    for entry in tensor.external_data:
        entry.value = wrong.get(entry.key, entry.value)
    _seal(copy, "prefix.onnx", graph.SerializeToString())
    with pytest.raises(
        BundleError, match=r"prefix.onnx: expected \d+ bytes of .* inside a file of the bundle, got"
    ):
        open_bundle(copy)


def test_a_graph_that_is_none_is_one_line_without_onnxruntimes_log(copy: Path, capfd: Any) -> None:
    _seal(copy, "prefix.onnx", b"\x08\x07\x3a\x03abc")
    with pytest.raises(TrioEdgeError):
        Pipeline.from_bundle(copy, backend="onnxruntime")
    assert capfd.readouterr().err == ""


def test_names_with_control_characters_are_refused_and_shown_escaped(copy: Path) -> None:
    manifest = json.loads((copy / "trio.json").read_bytes())
    manifest["graphs"][0]["name"] = "\x1b]0;title\x07\u202evision"
    (copy / "trio.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError) as caught:
        open_bundle(copy)
    assert is_clear(str(caught.value))


# Tokenizers


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "p" * 5000}] * 9}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "add_prefix_space": True,
                                                                  "trim_offsets": True, "use_regex": False}] * 60}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}},
        {"decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100_000}},
        {"post_processor": {"type": "BertProcessing", "sep": ["x", 99], "cls": ["y", 4_000_000_000]}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                   "max_input_chars_per_word": 100}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "<image>": 3_000_000_000}, "unk_token": "a"}},
    ],
    ids=["replace", "prepend", "bytes", "pattern", "decoder", "post-processor", "no unknown token", "large ids"],
)  # fmt: skip
def test_a_tokenizer_that_hung_or_ended_the_process_is_one_line(change: dict[str, Any], copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_bytes()) | change
    image = open_bundle(copy).manifest.text
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(BundleError) as caught:
        tokenizer = Tokenizer.from_file(copy / "tokenizer.json")
        tokenizer.encode_prompt("aaaaaaaaaaaaaaaaaaaa what?" * 50, image)
    assert is_clear(str(caught.value))


def test_a_token_without_a_row_in_the_table_is_one_line(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_bytes())
    content["model"]["vocab"]["w1"] = 1_000_000
    _seal(copy, "tokenizer.json", json.dumps(content).encode())
    with (
        Pipeline.from_bundle(copy, backend="onnxruntime") as pipeline,
        pytest.raises(BundleError, match=r"expected token ids below \d+ \(rows of the table\), got 1000000"),
    ):
        _ = pipeline.generate(Image.new("RGB", (48, 48)), "w1").text


# Flags


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        (cli_run, ["{bundle}", "--prompt", "w1", "--image", "{image}", "--show-kept", LONG + ".png"]),
        (cli_run, ["{bundle}", "--prompt", "w1", "--image", LONG]),
        (cli_run, ["{bundle}", "--prompt", "w1", "--image", "{image}", "--show-kept", "a\0.png"]),
        (cli_run, ["{bundle}", "--prompt", "w1", "--threads", "860"]),
        (cli_run, [LONG, "--prompt", "w1"]),
        (cli_run, ["{bundle}", "--prompt", "w1", "--max-pixels", "0"]),
        (cli_inspect, [LONG]),
        (cli_inspect, ["a\0b"]),
        (cli_build, [LONG, "--dry-run"]),
        (cli_export, [LONG, "--out", "{folder}/x"]),
        (cli_export, ["tiny", "--out", "/", "--force"]),
        (cli_export, ["tiny", "--out", LONG]),
        (cli_eval, ["{bundle}", "--data", "{image}", "--count", "99999999999999999999"]),
        (cli_eval, ["{bundle}", "--data", "{image}", "--json", LONG]),
        (cli_eval, ["{bundle}", "--data", LONG]),
        (cli_calibrate, ["tiny", "--samples", "{folder}", "--target", "jetson-orin-nano-8", "--out", "/"]),
        (cli_calibrate, ["tiny", "--samples", LONG, "--target", "jetson-orin-nano-8", "--out", "{folder}/x"]),
        (cli_calibrate, ["tiny", "--samples", "{folder}", "--count", "2147483648", "--out", "{folder}/x"]),
        (cli_profile, ["{bundle}", "--html", LONG + ".html"]),
        (cli_profile, ["{bundle}", "--json", LONG]),
        (cli_profile, [LONG]),
    ],
)
def test_odd_flags_are_one_line(
    module: Any, arguments: list[str], reduced_bundle: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (48, 48)).save(tmp_path / "image.png")
    places = {"bundle": reduced_bundle, "image": tmp_path / "image.png", "folder": tmp_path}
    code = module.main([argument.format(**places) for argument in arguments])
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert is_clear(line)
    assert not progress or module in (cli_export, cli_calibrate)
