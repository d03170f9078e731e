"""trio-calibrate: what it writes, that it repeats, and one line for everything a user can do wrong."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.calibration.question_files import questions_about, write_questions
from tests.shared_traces import shared_traces
from trio_edge.calibration.model.torch_model import load_model
from trio_edge.calibration.progress import StepProgress
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.calibration.search.calibrate import Calibrated, calibrate
from trio_edge.calibration.search.calibration_file import Calibration, json_of
from trio_edge.calibration.search.measuring import RECORD_NAME, RecordKey, opened_measurements
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.output import summary_of
from trio_edge.export.quantize.scales import CalibratedScales
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
        assert cli_calibrate.main([*arguments, "--max-kl", "1", *SMALL_SEARCH, "--quiet"]) == 0
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


def test_the_bound_holds_and_the_parts_do_not_overlap(report: dict[str, Any]) -> None:
    assert report["chosen"]["search"]["kl"]["interval_95"][1] <= 1.0
    data = report["data"]
    assert (data["samples"], data["search"], data["held_out"], data["images"]) == (6, 4, 2, 3)
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


def test_a_config_repeats_the_calibration(calibrated: Path, report: dict[str, Any], tmp_path: Path) -> None:
    config = str(calibrated / "calibration.json")
    arguments = ["--config", config, "--out", str(tmp_path / "again"), "--no-export", "--quiet"]
    assert cli_calibrate.main(arguments) == 0
    assert json.loads((tmp_path / "again" / "calibration.json").read_bytes()) == report
    assert not (tmp_path / "again" / "bundle").exists()


def test_an_interrupted_calibration_goes_on_where_it_stopped(report: dict[str, Any], tmp_path: Path) -> None:
    options = CalibrationOptions(**{**report["options"], **_tuples(report["options"])})
    record, samples_seen = tmp_path / RECORD_NAME, iter(range(15))

    def stop() -> None:
        if next(samples_seen, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(options, work=tmp_path, progress=StepProgress(sample=stop))
    done = record.read_bytes()
    record.write_bytes(done + b'{"type":"sched')  # a kill in the middle of a line
    again = calibrate(options, work=tmp_path, progress=StepProgress()).calibration
    assert json.loads(json_of(again)) == report
    lines = record.read_bytes()
    assert lines.startswith(done)
    assert len(set(lines.splitlines())) == len(lines.splitlines())


def test_ctrl_c_leaves_no_output(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = Calibrated(_read(calibrated), CalibratedScales())
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
    model: Any = None
    with opened_measurements(model, key, tmp_path):
        pass
    other = msgspec.structs.replace(key, samples_sha256="b")
    refused = pytest.raises(DataError, match=r"got others \(samples_sha256 differ\); choose another --work")
    with refused, opened_measurements(model, other, tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="has no such lock")
def test_a_work_folder_in_use_is_refused(tmp_path: Path) -> None:
    key = RecordKey(
        model="tiny", weights="w", samples_sha256="a", answer_tokens=4, dtype="float32", max_visual=9
    )
    refused = pytest.raises(DataError, match="got a second one")
    model: Any = None
    with (
        opened_measurements(model, key, tmp_path),
        refused,
        opened_measurements(model, key, tmp_path),
    ):
        pass


def test_another_bound_replaces_the_configs(calibrated: Path, report: dict[str, Any]) -> None:
    config = calibrated / "calibration.json"
    options, samples = cli_calibrate.read_given(None, config, {"max_kl": 0.1})
    assert (options.max_kl, samples) == (0.1, report["data"]["sha256"])
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
        ["--samples", "{tmp}/several.jsonl"],
        "several.jsonl:1: expected one image, got 2",
    ),
    "a damaged image": (["--samples", "{damaged}", "--prompt", "w1"], "damaged.png"),
    "a special token in a prompt": (["--samples", "{pictures}", "--prompt", "<image>"], "special token"),
    "an unknown target": (["--target", "orin-nx-17"], "did you mean"),
    "time where none is saved": (["--cost", "time"], "--cost time: expected a schedule faster than keep-all"),
    "an unknown layer": (["--layers", "7"], "--layers: expected layers in 1..2"),
    "no layer": (["--layers", "one"], "--layers: expected numbers"),
    "a whole budget": (["--keeps", "100%"], "--keeps: expected shares"),
    "no share": (["--held-out", "half"], "--held-out: expected a percentage"),
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
    several = [{"images": [f"pictures/{n}.png", "damaged/0.png"], "question": "w1"} for n in (0, 1)]
    write_questions(tmp_path, several, name="several.jsonl")
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


def test_the_export_command_in_the_summary_names_every_choice(
    report: dict[str, Any], calibrated: Path
) -> None:
    command = re.search("trio-export .+", summary_of(_read(calibrated), calibrated, exported=False))
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


def _interrupted(*_arguments: Any, **_options: Any) -> None:
    raise KeyboardInterrupt


def _read(folder: Path) -> Calibration:
    return msgspec.json.decode((folder / "calibration.json").read_bytes(), type=Calibration)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
