"""Values of every kind for every argument of ``Pipeline``, and names of every kind for every command: one plain line each."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, features

from tests.pictures import random_picture
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.runtime.bundle.errors import BundleError, ManifestError, ShapeError, TrioEdgeError
from trio_edge.runtime.bundle.files import write_output
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli import build as cli_build
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.cli import run as cli_run
from trio_edge.runtime.pipeline import Pipeline

IMAGE = random_picture(48, 48)
ODD: dict[str, Any] = {
    "None": None, "a number": 5, "a fraction": 2.5, "a truth": True, "text": "x", "bytes": b"x", "a list": [], "a dict": {},
    "an object": object(), "NaN": float("nan"), "below 0": -1, "400 digits": 10**400, "a null byte": "a\0b",
    "half a character": "\ud800", "a list of texts": ["x"], "a pair": (1, 2), "an image": Image.new("RGB", (2, 2)),
}  # fmt: skip
LOADING = ("backend", "threads", "cpu_accuracy", "keep_images", "max_pixels")
ASKING = (
    "video", "fps", "num_frames", "source_fps", "history", "system", "max_new_tokens", "temperature", "top_p", "top_k",
    "seed", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "constraint", "override", "presence_penalty",
    "frequency_penalty", "logit_bias", "num_logprobs",
)  # fmt: skip


def only_our_errors(action: Callable[[], object]) -> None:
    try:
        action()
    except TrioEdgeError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()


@pytest.fixture(scope="module")
def pipeline(reduced_bundle: Path) -> Any:
    with Pipeline.from_bundle(reduced_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.mark.parametrize("value", ODD)
def test_any_value_opens_a_bundle_or_is_one_line(value: str, reduced_bundle: Path) -> None:
    with pytest.raises(BundleError):
        open_bundle(ODD[value])
    with pytest.raises(BundleError):
        Pipeline.from_bundle(ODD[value])
    for name in LOADING:
        only_our_errors(lambda name=name: Pipeline.from_bundle(reduced_bundle, **{name: ODD[value]}).close())


@pytest.mark.parametrize("value", ODD)
def test_any_value_is_asked_or_is_one_line(value: str, pipeline: Pipeline) -> None:
    odd = ODD[value]
    only_our_errors(lambda: pipeline.generate(odd, "w1", max_new_tokens=1).text)
    only_our_errors(lambda: pipeline.generate([IMAGE, odd], "w1", max_new_tokens=1).text)
    only_our_errors(lambda: pipeline.generate(IMAGE, odd, max_new_tokens=1).text)
    only_our_errors(lambda: pipeline.time_tokens(odd))
    for name in ASKING:
        only_our_errors(
            lambda name=name: pipeline.generate(IMAGE, "w1", **{"max_new_tokens": 1, name: odd}).text
        )
    for messages in (
        odd,
        [odd],
        [{"role": "user", "content": odd}],
        [{"role": odd, "content": "w1"}],
        [{"role": "user", "content": [odd]}],
        *([{"role": "user", "content": [{"type": kind, kind: odd}]}] for kind in ("text", "image", "video")),
    ):
        only_our_errors(lambda messages=messages: pipeline.chat(messages, max_new_tokens=1).text)


# Names

NAMES = {
    "not UTF-8": os.fsdecode(b"caf\xe9"),
    "an escape": "a\x1b[31mb",
    "a mark": "a\u202eb",
    "two lines": "a\nb",
}


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_file_is_printed_as_plain_text(
    name: str, reduced_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / NAMES[name]
    odd.mkdir()
    bundle = shutil.copytree(reduced_bundle, odd / NAMES[name])
    (odd / "data.jsonl").write_text(json.dumps({"image": "i.png", "question": "w1", "answer": "w2"}))
    IMAGE.save(odd / "i.png")
    missing = odd / "none"
    asked = ["--image", str(odd / "i.png"), "--prompt", "w1", "--threads", "1", "--max-new-tokens", "2"]
    runs = [
        (cli_run, [str(bundle), *asked, "--show-kept", str(odd / "k.png")]),
        (cli_run, [str(missing), *asked]),
        (cli_run, [str(reduced_bundle), *asked, "--image", str(missing)]),
        (cli_inspect, [str(bundle)]),
        (cli_inspect, [str(missing)]),
        (cli_build, [str(bundle), "--dry-run"]),
        (cli_build, [str(bundle), "--backend", "onnxruntime", "--quiet"]),
        (
            cli_eval,
            [
                str(bundle),
                "--data",
                str(odd / "data.jsonl"),
                "--answer-tokens",
                "1",
                "--quiet",
                "--json",
                str(odd / "r"),
            ],
        ),
    ]
    for module, arguments in runs:
        code = module.main(arguments)
        out, err = capfd.readouterr()
        assert code in (0, 2), arguments
        assert not {"\x1b", "\u202e"} & {*out, *err}, arguments
        assert "Traceback" not in err
        if code == 2 and module is not cli_build:
            assert err.count("\n") == 1, err
    assert (odd / "k.png").exists() == (name != "not UTF-8")  # which onnxruntime cannot open


@pytest.mark.parametrize("kind", ["a pipe", "a link", "a link to nowhere", "a link to itself", "a file"])
def test_engines_that_are_no_folder_are_one_line_or_left_out(
    kind: str, reduced_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle, elsewhere = shutil.copytree(reduced_bundle, tmp_path / "bundle"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    engines = bundle / "engines"
    if kind == "a pipe":
        os.mkfifo(engines)
    elif kind == "a file":
        engines.touch()
    else:
        engines.symlink_to({"a link": elsewhere, "a link to nowhere": tmp_path / "no"}.get(kind, engines))
    for arguments in (["--backend", "onnxruntime"], ["--dry-run", "--compute-capability", "86"]):
        assert cli_build.main([str(bundle), *arguments, "--quiet"]) == 2
        assert "expected a folder, got a link or a file; move it away" in capfd.readouterr().err
    assert not any(elsewhere.iterdir())
    assert cli_inspect.main([str(bundle)]) == 0
    assert cli_run.main([str(bundle), "--prompt", "w1", "--threads", "1", "--max-new-tokens", "1"]) == 0


# Files that a command writes

_WRITES = """
import os, resource, signal, sys
from pathlib import Path
from trio_edge.runtime.bundle.files import write_output
how, target = sys.argv[1:]
if how == "a full disk":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
else:
    write = Path.write_bytes
    Path.write_bytes = lambda file, content: (write(file, content[:9]), os.kill(os.getpid(), signal.SIGKILL))
write_output("--show-kept", Path(target), b"new" * 100_000)
"""


@pytest.mark.parametrize("how", ["a full disk", "a kill"])
def test_an_old_file_outlives(how: str, tmp_path: Path) -> None:
    target = tmp_path / "kept.png"
    target.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", _WRITES, how, target], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert target.read_bytes() == b"old"
    write_output("--show-kept", target, b"new")  # deletes what the killed one has left
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("kept.png", b"new")]


def test_a_drawing_replaces_the_file_that_a_link_names(reduced_bundle: Path, tmp_path: Path) -> None:
    for name, suffix in itertools.product(("old", "link"), (".png", ".jpg", ".webp")):
        (tmp_path / f"{name}{suffix}").unlink(missing_ok=True)
        if name == "link":
            (tmp_path / f"link{suffix}").symlink_to(tmp_path / f"old{suffix}")
        IMAGE.save(tmp_path / "i.png")
        target = tmp_path / f"{name}{suffix}"
        asked = [
            "--image",
            str(tmp_path / "i.png"),
            "--prompt",
            "w1",
            "--threads",
            "1",
            "--max-new-tokens",
            "1",
        ]
        assert cli_run.main([str(reduced_bundle), *asked, "--show-kept", str(target)]) == 0
        with Image.open(tmp_path / f"old{suffix}") as drawn:
            assert drawn.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[suffix]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


# Bundles whose manifest is of another model


def _profile(axis: str, size: int) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        (graph,) = (one for one in manifest["graphs"] if one["role"] == "vision")
        graph["profiles"][-1]["sizes"][axis] = size
        (program,) = (one for one in manifest["programs"] if one["name"] == "vision")
        program["sizes"][-1][axis] = size

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "many tiles": (_profile("B", 65536), r"expected profiles with B <= \d+, the most of an image, got 65536"),
    "many tokens": (
        _profile("N", 1 << 19),
        r"expected profiles with N <= \d+, the most of an image, got 524288",
    ),
    "an offset": (
        lambda manifest: _move(manifest, 4),
        r"expected float32 \[\d+, \d+\] at byte \d+, got another tensor",
    ),
    "an offset before": (lambda manifest: _move(manifest, -4), "got another tensor"),
    "encoder_keep": (lambda manifest: manifest.update(encoder_keep=2), "encoder_keep: expected a number if"),
}


def _move(manifest: dict[str, Any], by: int) -> None:
    manifest["token_embedding"]["offset"] += by


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_would_change_answers_is_refused(
    change: str, reduced_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "trio.json").read_bytes())
    CHANGES[change][0](manifest)
    (bundle / "trio.json").write_text(json.dumps(manifest))
    with pytest.raises((ManifestError, BundleError, ShapeError), match=CHANGES[change][1]):
        Pipeline.from_bundle(bundle, threads=1)


# Libraries that print


@pytest.mark.skipif(not features.check("libtiff"), reason="Pillow has no libtiff")
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "jpeg", "group4"])
def test_a_damaged_tiff_prints_no_line_of_libtiff(
    compression: str, reduced_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, image = tmp_path / "image.tif", IMAGE.convert("1") if compression == "group4" else IMAGE
    image.save(file, compression=compression)
    data = bytearray(file.read_bytes())
    for place in range(len(data) // 4, len(data) // 2, 3):
        data[place] ^= 0x5A
    file.write_bytes(data)
    asked = ["--image", str(file), "--prompt", "w1", "--threads", "1", "--max-new-tokens", "1"]
    assert cli_run.main([str(reduced_bundle), *asked]) in (0, 2)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(("trio-run: image ", "onnxruntime: first token "))
