"""The format "trio" of transformers' exporters: the bundle that trio-export writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.pictures import random_picture
from trio_edge.export.cli import main
from trio_edge.export.options import ExportOptions, LevelRequest
from trio_edge.runtime.bundle.errors import CheckpointError, ScheduleError, ShapeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

exporters = pytest.importorskip("transformers.exporters", reason="transformers before 5.23 has no exporters")
OPTIONS: dict[str, list[str]] = {
    "keep all": ["--keep", "all"],
    "reduced": ["--schedule", "1:14,2:6", "--dtype", "float32"],
    "levels": ["--level", "low=1:6", "--level", "full=all", "--quantize", "int8", "--batch", "2"],
}
SMALL = ["--max-text", "64", "--max-new-tokens", "8"]


@pytest.fixture
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(checkpoint)


def exported(model: Any, options: list[str], folder: Path) -> Path:
    from trio_edge.export.transformers_exporter import TrioConfig

    config = TrioConfig(options=[*options, *SMALL])
    found = exporters.AutoHfExporter.from_config(config).export_for_generation(model, {}, config)
    found.save_pretrained(folder)
    assert list(found.components) == ["model"]
    return folder / "model"


@pytest.mark.parametrize("name", OPTIONS)
def test_the_bundle_is_that_of_trio_export(name: str, model: Any, checkpoint: Path, tmp_path: Path) -> None:
    bundle = exported(model, OPTIONS[name], tmp_path / "exported")
    own = tmp_path / "own"
    assert main([str(checkpoint), "--out", str(own), "--quiet", *OPTIONS[name], *SMALL]) == 0
    files = sorted(path.relative_to(own) for path in own.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(bundle) for path in bundle.rglob("*") if path.is_file())
    for file in files:
        assert (bundle / file).read_bytes() == (own / file).read_bytes(), file
    with Pipeline.from_bundle(bundle) as pipeline:
        assert pipeline.generate(random_picture(48, 48), "w1", max_new_tokens=2).text is not None


def test_what_was_saved_says_what_it_is_and_loads(model: Any, tmp_path: Path) -> None:
    from trio_edge.export.transformers_exporter import TrioConfig

    bundle = exported(model, OPTIONS["reduced"], tmp_path / "exported")
    written = json.loads((tmp_path / "exported" / "export.json").read_text())
    assert written["export_format"] == "trio"
    assert written["components"]["model"]["metadata"]["export_config"]["options"][:2] == [
        "--schedule",
        "1:14,2:6",
    ]
    loaded = exporters.ExportedModel.from_pretrained(tmp_path / "exported")
    assert loaded.program.path == bundle
    assert isinstance(
        exporters.AutoExportConfig.from_dict({"export_format": "trio", "options": []}), TrioConfig
    )


def test_a_changed_model_is_refused(model: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        next(iter(model.parameters()))[0] += 1
    with pytest.raises(
        CheckpointError, match=r"expected the model's weights, got others in .*; save it with its processor"
    ):
        exported(model, [], tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_model_made_in_memory_is_refused(model: Any, tmp_path: Path) -> None:
    made = type(model)(model.config)
    made.name_or_path = ""
    with pytest.raises(CheckpointError, match="got one made in memory; save it with its processor"):
        exported(made, [], tmp_path / "exported")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--max-visual", "many"], ShapeError, "many"),
        (["--unknown", "1"], ShapeError, "--unknown"),
        (["--keep", "5%", "--schedule", "1:3"], ShapeError, "expected one of them, got both"),
        (["--batch", "3"], ScheduleError, "--batch: expected one of"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    options: list[str], error: type[Exception], message: str, model: Any, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        exported(model, options, tmp_path / "exported")


def test_options_are_those_of_the_command(tmp_path: Path) -> None:
    from trio_edge.export.cli import options_from

    found = options_from("tiny", ["--out", str(tmp_path), "--level", "low=5%@base", "--level", "full=all"])
    assert isinstance(found, ExportOptions)
    assert [level.name for level in found.levels] == ["low", "full"]
    assert found.levels[0] == LevelRequest("low", found.levels[0].schedule, "base")
