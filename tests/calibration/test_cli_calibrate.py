"""trio-calibrate: what it writes, that it repeats, and one line for everything a user can do wrong."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.calibration.question_files import questions_about, write_questions
from tests.shared_traces import shared_traces
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.calibration.search.calibrate import Calibrated, SearchProgress, calibrate
from trio_edge.calibration.search.calibration_file import Calibration, json_of
from trio_edge.calibration.search.measuring import RECORD_NAME, RecordKey, opened_record
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.page import page_of
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

SMALL_SEARCH = ("--keeps", "10%,30%", "--evaluations", "4", "--answer-tokens", "2", "--max-new-tokens", "8")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("samples"), questions_about(6))


@pytest.fixture(scope="module")
def calibrated(checkpoint: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration with its bundle. No test may change it."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    arguments = [str(checkpoint), "--samples", str(samples), "--target", "orin-nx-16", "--out", str(out)]
    with shared_traces():
        assert cli_calibrate.main([*arguments, "--keep", "50%", *SMALL_SEARCH, "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def report(calibrated: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((calibrated / "calibration.json").read_bytes())
    return content


def test_the_bundle_has_the_chosen_schedule_and_shapes(calibrated: Path, report: dict[str, Any]) -> None:
    with Pipeline.from_bundle(calibrated / "bundle", threads=1) as pipeline:
        manifest = pipeline.manifest
        stages = [[stage.layer, stage.keep] for stage in manifest.schedule.stages]
        assert stages == report["chosen"]["stages"]
        assert stages
        assert manifest.schedule.nms_rounds > report["shapes"]["largest_rounds"]
        assert list(manifest.text_buckets) == report["shapes"]["text_buckets"]
        sizes = [[size.width, size.height] for size in manifest.image_sizes]
        assert sizes == report["shapes"]["image_sizes"]
        assert manifest.average_keep <= 0.5


def test_the_wish_holds_and_the_parts_do_not_overlap(report: dict[str, Any]) -> None:
    assert report["chosen"]["average_keep"] <= 0.5005
    data = report["data"]
    assert (data["samples"], data["search"], data["held_out"], data["pictures"]) == (6, 4, 2, 3)
    assert report["chosen"]["held_out"]["samples"] == 2
    assert report["chosen"]["search"]["samples"] == 4
    assert report["accuracy"]["samples"] == 2


def test_the_front_is_ordered_and_ends_with_keep_all(report: dict[str, Any]) -> None:
    front = report["front"]
    assert report["compared_by"] == "flops"  # so small a model gains no time on any device
    assert [point["flops"] for point in front] == sorted(point["flops"] for point in front)
    errors = [point["search"]["kl"]["value"] for point in front]
    assert errors == sorted(errors, reverse=True)
    assert (front[-1]["stages"], errors[-1]) == ([], 0.0)
    assert front[-1]["flops"] == pytest.approx(report["keep_all_flops"])


def test_every_single_stage_is_reported(report: dict[str, Any]) -> None:
    assert {(one["layer"], one["keep"]) for one in report["single_stages"]} == {
        (layer, keep) for layer in (1, 2) for keep in (5, 15)
    }


def test_the_page_is_well_formed_and_needs_nothing_else(calibrated: Path, report: dict[str, Any]) -> None:
    text = (calibrated / "calibration.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.count["svg"] == 3  # two of the front, one of layers
    assert page.count["script"] == page.count["link"] == page.count["iframe"] == 0
    assert all(url.startswith(("data:image/png;base64,", "#")) for url in page.urls)
    assert len(page.ids) == len(set(page.ids))
    assert all(url[1:] in page.ids for url in page.urls if url.startswith("#"))
    stages = ", ".join("{}:{}".format(*stage) for stage in report["chosen"]["stages"])
    assert f"Chosen: {stages}" in page.text
    assert "trio-export" in page.text


def test_a_name_cannot_write_into_the_page(calibrated: Path) -> None:
    calibration = _read(calibrated)
    evil = msgspec.structs.replace(calibration.options, model="<script>alert(1)</script>")
    page = page_of(msgspec.structs.replace(calibration, options=evil), command="<b>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page


def test_a_config_repeats_the_calibration(calibrated: Path, report: dict[str, Any], tmp_path: Path) -> None:
    config = str(calibrated / "calibration.json")
    arguments = ["--config", config, "--out", str(tmp_path / "again"), "--no-export", "--quiet"]
    assert cli_calibrate.main(arguments) == 0
    assert json.loads((tmp_path / "again" / "calibration.json").read_bytes()) == report
    first, second = (path / "calibration.html" for path in (calibrated, tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert not (tmp_path / "again" / "bundle").exists()


def test_an_interrupted_calibration_goes_on_where_it_stopped(report: dict[str, Any], tmp_path: Path) -> None:
    options = CalibrationOptions(**{**report["options"], **_tuples(report["options"])})
    record, samples_seen = tmp_path / RECORD_NAME, iter(range(15))

    def stop() -> None:
        if next(samples_seen, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(options, work=tmp_path, progress=SearchProgress(sample=stop))
    done = record.read_bytes()
    record.write_bytes(done + b'{"type":"sched')  # a kill in the middle of a line
    again = calibrate(options, work=tmp_path, progress=SearchProgress()).calibration
    assert json.loads(json_of(again)) == report
    lines = record.read_bytes()
    assert lines.startswith(done)
    assert len(set(lines.splitlines())) == len(lines.splitlines())


def test_ctrl_c_leaves_no_output(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Calibrated(calibration=_read(calibrated))
    module = "trio_edge.calibration.search.calibrate.calibrate"
    monkeypatch.setattr(module, lambda *_arguments, **_options: done)
    monkeypatch.setattr("trio_edge.export.bundle.export_bundle", _interrupted)
    config = str(calibrated / "calibration.json")
    assert cli_calibrate.main(["--config", config, "--out", str(tmp_path / "out"), "--quiet"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_work_folder_of_other_samples_is_refused(tmp_path: Path) -> None:
    key = RecordKey(
        model="tiny", weights="w", samples_sha256="a", answer_tokens=4, dtype="float32", max_visual=9
    )
    with opened_record(tmp_path, key) as (_, known):
        assert known == []
    other = msgspec.structs.replace(key, samples_sha256="b")
    refused = pytest.raises(DataError, match=r"got others \(samples_sha256 differ\); choose another --work")
    with refused, opened_record(tmp_path, other):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no such lock")
def test_a_work_folder_in_use_is_refused(tmp_path: Path) -> None:
    key = RecordKey(
        model="tiny", weights="w", samples_sha256="a", answer_tokens=4, dtype="float32", max_visual=9
    )
    refused = pytest.raises(DataError, match="got a second one")
    with opened_record(tmp_path, key), refused, opened_record(tmp_path, key):
        pass


def test_another_wish_replaces_the_configs(calibrated: Path, report: dict[str, Any]) -> None:
    config = calibrated / "calibration.json"
    options, samples = cli_calibrate.read_given(None, config, {"max_kl": 0.1})
    assert (options.keep, options.max_kl, samples) == (None, 0.1, report["data"]["sha256"])
    assert cli_calibrate.read_given(None, config, {"count": 5})[1] is None


def test_half_precision_weights_are_mapped_where_they_are_too_large_for_the_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr("trio_edge.calibration.model.torch_model._TINY_BYTES", 0)
    monkeypatch.setattr("trio_edge.calibration.model.torch_model._MEMORY_SHARE", 0.0)
    model = load_model("tiny")
    assert model.dtype == torch.float16
    assert load_model(str(checkpoint)).dtype == torch.float32  # as it is stored
    assert {parameter.dtype for parameter in model.parts.layers[0].parameters()} == {torch.float16}


BAD_CASES: dict[str, tuple[list[str], str]] = {
    "no samples": (["--samples", "{tmp}/none"], "got no such file"),
    "no folder": (["--samples", "{tmp}/none", "--prompt", "w1"], "got no such file"),
    "an empty folder": (["--samples", "{empty}", "--prompt", "w1"], "expected images"),
    "a folder without a prompt": (["--samples", "{empty}"], "expected --prompt"),
    "a prompt for a file": (["--prompt", "w1"], "expected --prompt with a folder"),
    "one image": (
        ["--count", "2", "--samples", "{one}", "--prompt", "w1"],
        "at least 2 different images",
    ),
    "several images": (
        ["--samples", "shapes-several", "--count", "4"],
        "900000000-two-which: expected one image, got 2",
    ),
    "a damaged image": (["--samples", "{damaged}", "--prompt", "w1"], "damaged.png"),
    "a special token in a prompt": (["--samples", "{pictures}", "--prompt", "<image>"], "special token"),
    "an unknown target": (["--target", "orin-nx-17"], "did you mean"),
    "a time nothing reaches": (["--target-ms", "0.001"], "--target-ms: expected at least"),
    "a keep nothing reaches": (["--keep", "1%"], "--keep: expected at least"),
    "time where none is saved": (["--cost", "time"], "--cost time: expected a schedule faster than keep-all"),
    "an unknown layer": (["--layers", "7"], "--layers: expected layers in 1..2"),
    "no layer": (["--layers", "one"], "--layers: expected numbers"),
    "a whole budget": (["--keeps", "100%"], "--keeps: expected shares"),
    "two wishes": (["--keep", "50%", "--max-kl", "0.1"], "keep: expected one, got"),
    "too long an answer": (["--max-new-tokens", "2000"], "jsonl:1, or lower --max-new-tokens"),
    "no place for the output": (
        ["--out", "{damaged}/damaged.png/out", "--samples", "none"],
        "expected {damaged}/damaged.png to be a writable folder",
    ),
    "no device": (["--device", "cudo"], "--device: expected a device that torch can use"),
    "an existing folder": (["--out", "{empty}"], "it exists"),
    "a folder of something else": (["--out", "{pictures}", "--force"], "expected a calibration to replace"),
}


@pytest.mark.parametrize("name", BAD_CASES)
def test_mistakes_are_one_line(
    name: str, checkpoint: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"tmp": tmp_path}
    for folder, files in (("empty", 0), ("one", 1), ("pictures", 2), ("damaged", 2)):
        places[folder] = tmp_path / folder
        places[folder].mkdir()
        for number in range(files):
            (places[folder] / f"{number}.png").write_bytes((samples.parent / f"p{number}.png").read_bytes())
    whole = (samples.parent / "p2.png").read_bytes()
    (tmp_path / "damaged" / "damaged.png").write_bytes(whole[: len(whole) // 2])
    given, expected = BAD_CASES[name]
    arguments = {"--samples": str(samples), "--target": "orin-nx-16", "--out": str(tmp_path / "out")}
    arguments |= {
        key: value.format(**places) for key, value in zip(given[::2], given[1::2]) if key != "--force"
    }
    words = [word for pair in arguments.items() for word in pair]
    words += ["--force"] if "--force" in given else []
    assert cli_calibrate.main([str(checkpoint), *words, "--no-export", "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert expected.format(**places) in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_export_command_on_the_page_names_every_choice(report: dict[str, Any], calibrated: Path) -> None:
    text = (calibrated / "calibration.html").read_text(encoding="utf-8")
    command = re.search(r"trio-export [^<]+", text)
    assert command is not None
    schedule = Schedule(**{**report["schedule"], "stages": ()})
    for words in (
        "--schedule " + ",".join("{}:{}".format(*stage) for stage in report["chosen"]["stages"]),
        f"--positions {schedule.positions}",
        f"--probe-rows {schedule.probe_rows}",
        f"--nms-threshold {schedule.nms_threshold:g}",
        f"--nms-rounds {schedule.nms_rounds}",
        "--max-text 16",
    ):
        assert words in command[0]


class _Page(HTMLParser):
    """Collects what a page loads, names and leaves open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.urls: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.count = dict.fromkeys(("svg", "img", "script", "link", "iframe"), 0)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.count:
            self.count[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value is not None:
                self.urls.append(value)
            if name == "id" and value is not None:
                self.ids.append(value)
        if tag not in ("meta", "img", "br", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _interrupted(*_arguments: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


def _read(folder: Path) -> Calibration:
    return msgspec.json.decode((folder / "calibration.json").read_bytes(), type=Calibration)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
