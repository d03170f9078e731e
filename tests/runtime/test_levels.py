"""Levels at the command line, in a manifest, in the file of margins, and as forms of an image."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.evaluate.answer_cost import level_flops
from trio_edge.calibration.levels import Answered, Chain, best_chain
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.export import cli as cli_export
from trio_edge.export.options import LevelRequest
from trio_edge.profiling import cli as cli_profile
from trio_edge.runtime.bundle.checks import manifest_from_json
from trio_edge.runtime.bundle.errors import BundleError, ManifestError, ScheduleError, ShapeError
from trio_edge.runtime.bundle.manifest import json_from_manifest
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.cli import inspect as cli_inspect
from trio_edge.runtime.cli import run as cli_run
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.images.interface import at_form
from trio_edge.runtime.images.llava import LlavaImages
from trio_edge.runtime.images.qwen import Qwen3Images
from trio_edge.runtime.images.tiles import InternVlImages, SmolVlmImages
from trio_edge.runtime.model.levels import MARGINS_NAME, read_margins
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

LEVELS = (
    LevelRequest("usual", Schedule(stages=(Stage(layer=1, keep=20), Stage(layer=2, keep=8)))),
    LevelRequest("quick", Schedule(stages=(Stage(layer=1, keep=9), Stage(layer=2, keep=4))), "base"),
    LevelRequest("full", Schedule()),
)


@pytest.fixture(scope="module")
def levelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(save_checkpoint(tmp_path_factory.mktemp("levels") / "ck"), levels=LEVELS)


@pytest.fixture
def copy(levelled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(levelled, tmp_path / "bundle")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    random_picture(60, 45).save(path := tmp_path / "picture.png")
    return path


@pytest.fixture
def questions(tmp_path: Path, levelled: Path) -> Path:
    """Half of the answers are those of the level that keeps all."""
    lines = []
    with Pipeline.from_bundle(levelled, threads=1) as pipeline:
        for number in range(8):
            image = random_picture(60, 45, seed=number)
            image.save(tmp_path / f"{number}.png")
            answer = pipeline.generate(
                image, f"w{number}", level="full", max_new_tokens=3, temperature=0
            ).text
            text = answer if number % 2 else "w99"
            lines.append(
                {"id": f"{number}", "image": f"{number}.png", "question": f"w{number}", "answer": text}
            )
    (path := tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# Commands


def test_trio_run_at_a_level(levelled: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(levelled), "--image", str(picture), "--prompt", "w1 w2", "--max-new-tokens", "3"]
    for level in ("usual", "quick", "full"):
        assert cli_run.main([*asked, "--level", level]) == 0
        assert f"level {level}" in capsys.readouterr().err
    decision = ["--choices", "w1,w2", "--level", "quick", "--json"]
    assert cli_run.main([*asked[:-2], *decision]) == 0
    assert json.loads(capsys.readouterr().out)["level"] == "quick"
    assert cli_run.main([*asked, "--level", "other"]) == 2
    error = capsys.readouterr().err
    assert "level: expected auto or one of the bundle's levels (quick, usual, full), got 'other'" in error
    assert len(error.strip().splitlines()) == 1


def test_trio_run_goes_up(copy: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / MARGINS_NAME).write_text('{"quick": 1.0, "usual": 1.0, "full": 0.0}')
    asked = [str(copy), "--image", str(picture), "--prompt", "w1 w2", "--level", "auto"]
    assert cli_run.main([*asked, "--show-kept", str(picture.with_name("kept.png"))]) == 0
    assert "level full after quick, usual" in capsys.readouterr().err


def test_compare_full_needs_one_bundle(
    levelled: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--image", str(picture), "--prompt", "w1 w2", "--max-new-tokens", "3"]
    assert cli_run.main([str(levelled), *asked, "--compare-full"]) == 0
    own = capsys.readouterr().out
    assert cli_run.main([str(levelled), *asked, "--compare-full", str(levelled)]) == 0
    with Pipeline.from_bundle(levelled, threads=1) as pipeline:
        full = pipeline.generate(picture, "w1 w2", level="full", max_new_tokens=3).text
    for text in (own, capsys.readouterr().out):
        assert f"keep-all answer: {full}" in text


def test_trio_inspect_lists_levels(levelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_inspect.main([str(levelled), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["level"] == "usual"
    assert [level["name"] for level in found["levels"]] == ["quick", "usual", "full"]
    assert [level["flops"] for level in found["levels"]] == sorted(
        level["flops"] for level in found["levels"]
    )
    assert cli_inspect.main([str(levelled)]) == 0
    shown = capsys.readouterr().out
    assert "keeps all" in shown
    assert "(default)" in shown


def test_trio_profile_measures_and_predicts_a_level(
    levelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    for level, kept in (("quick", [9, 4]), ("full", [])):
        arguments = [str(levelled), "--level", level, "--json", str(file)]
        options = ["--runs", "1", "--warm-up", "1", "--no-layers", "--new-tokens", "2"]
        assert cli_profile.main([*arguments, *options]) == 0
        graphs = json.loads(file.read_bytes())["bundles"][0]["graphs"]
        assert ("select_1" in str(graphs)) == (level == "usual")
        assert {graph["phase"] for graph in graphs} == {"prefill", "decode"}
        assert cli_profile.main([*arguments, "--predict", "jetson-orin-nx-16"]) == 0
        assert json.loads(file.read_bytes())["found"][0]["visual_tokens"][1:] == kept
    capsys.readouterr()
    assert cli_profile.main([str(levelled), "--level", "auto", "--runs", "1"]) == 2
    assert "level: expected one of quick, usual, full, got auto" in capsys.readouterr().err


def test_trio_eval_asks_levels_of_one_bundle(
    levelled: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{levelled}@{level}" for level in ("quick", "usual", "full", "auto")]
    arguments = [*names, "--data", str(questions), "--quiet", "--json", str(tmp_path / "report.json")]
    assert cli_eval.main([*arguments, "--reference", f"{levelled}@full", "--answer-tokens", "3"]) == 0
    runs = {
        run["run"]["label"].rpartition("@")[2]: run
        for run in json.loads((tmp_path / "report.json").read_bytes())["runs"]
    }
    assert runs.keys() == {"quick", "usual", "full", "auto"}
    assert runs["full"]["accuracy"]["value"] == 0.5
    for level, run in runs.items():
        outcomes = run["outcomes"]
        assert level == "auto" or {one.get("level") for one in outcomes} == {level}
    with Pipeline.from_bundle(levelled, threads=1) as pipeline:
        for one in runs["auto"]["outcomes"]:
            image = random_picture(60, 45, seed=one["index"])
            wanted, before = 0.0, None
            for name in (*one.get("levels_below", ()), one["level"]):
                own = pipeline.level_named(name)
                wanted += level_flops(own, [image], num_text=one["text_tokens"], before=before)
                before = own
            assert one["flops"] == pytest.approx(wanted)
    capsys.readouterr()
    assert cli_eval.main([f"{levelled}@other", "--data", str(questions), "--quiet"]) == 2
    assert "got 'other'" in capsys.readouterr().err


def test_trio_calibrate_finds_margins(
    copy: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(copy), "--levels", "--samples", str(questions), "--quiet"]
    assert cli_calibrate.main(arguments) == 0
    assert f"stored in {copy / MARGINS_NAME}" in capsys.readouterr().out.replace("\n", "")
    manifest = open_bundle(copy).manifest
    margins = read_margins(copy, manifest)
    assert margins
    assert [*margins] == [name for name in manifest.level_names if name in margins]
    assert [*margins.values()][-1] == 0.0
    assert cli_calibrate.main([*arguments, "--mean-flops", "50%"]) == 0
    assert "full" not in read_margins(copy, manifest)
    for more, message in (
        (["--accuracy", "99%", "--mean-flops", "50%"], "expected one of them"),
        (["--temperatures"], "--temperatures and --levels: expected one of them"),
        (["--out", "x"], "--levels: expected a bundle and --samples, and only --count"),
    ):
        assert cli_calibrate.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_trio_calibrate_refuses_a_bundle_of_one_level(
    reduced_bundle: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli_calibrate.main([str(reduced_bundle), "--levels", "--samples", str(questions), "--quiet"]) == 2
    assert "--levels: expected a bundle with several levels, got one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (["quick"], "--level: expected NAME=KEEP[@FORM], got 'quick'"),
        (["quick=7.5%@base@base"], "--level: expected NAME=KEEP[@FORM]"),
        (["quick=many"], "keep 'many': expected"),
        (["quick=7.5%", "--keep", "all"], "--level: expected neither --keep nor --schedule with it"),
        (["auto=7.5%"], "and not 'auto', got 'auto'"),
        (["Quick=7.5%"], "expected a name of small letters, digits, - and _"),
        (["quick=33%", "--level", "quick=all"], "expected different names, got quick, quick"),
        (["quick=33%@tiny"], "expected @base, @low or @WIDTHxHEIGHT in pixels, got @tiny"),
        (["quick=33%@8x8"], "expected an image form that the model's images can have, got @8x8"),
        (["a=1:9", "--level", "b=2:4"], "expected stages at the same layers in all levels, got [1] and [2]"),
    ],
)
def test_trio_export_refuses_levels_in_one_line(
    levels: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint(tmp_path / "ck")
    arguments = [str(folder), "--out", str(tmp_path / "bundle"), "--quiet", "--level", *levels]
    assert cli_export.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "bundle").exists()


def test_the_preset(tmp_path: Path) -> None:
    folder = save_checkpoint(
        tmp_path / "ck", num_layers=16, patch_size=4
    )  # few tokens or layers cannot keep so little
    options = ["--max-text", "32", "--text-buckets", "32", "--max-new-tokens", "4", "--quiet"]
    assert (
        cli_export.main([str(folder), "--out", str(tmp_path / "bundle"), "--level", "preset", *options]) == 0
    )
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.level, {*manifest.level_names}) == ("usual", {"usual", "quick", "full"})
    usual, quick, full = map(manifest.at_level, ("usual", "quick", "full"))
    assert max(usual.average_keep, quick.average_keep) <= 0.111
    assert full.schedule.stages == ()
    assert quick.image_processing["is_one_of_several"]
    assert not usual.image_processing["is_one_of_several"]


# The manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["levels"][0].update(name="usual"), "levels: expected different names"),
        (lambda content: content["levels"][0].update(name="../x"), "name"),
        (lambda content: content["levels"].pop(), "graph .*: expected a level for each profile"),
        (lambda content: content["levels"][1].update(programs=[]), "expected"),
        (
            lambda content: content["levels"][1].update(visual_sizes=[3, 2]),
            "visual_sizes: expected ascending",
        ),
        (lambda content: content["levels"][0].update(schedule=content["levels"][1]["schedule"]), "expected"),
        (lambda content: content["levels"][0].update(more=1), "more"),
        (
            lambda content: content["levels"][0]["programs"][1]["launches"][0]["inputs"].update(
                input_embeds="rows.nothing"
            ),
            "expected",
        ),
    ],
)
def test_a_broken_level_is_refused_in_one_line(
    change: Callable[[Any], Any], message: str, levelled: Path
) -> None:
    content = json.loads((levelled / "trio.json").read_bytes())
    change(content)
    with pytest.raises(ManifestError, match=message) as caught:
        manifest_from_json(json.dumps(content).encode(), where="trio.json")
    assert "\n" not in str(caught.value)


def test_a_manifest_with_levels_reads_back(levelled: Path) -> None:
    manifest = open_bundle(levelled).manifest
    assert manifest_from_json(json_from_manifest(manifest), where="test") == manifest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected margins by level"),
        ('{"quick": 2}', "expected margins by level"),
        ('{"quick": "0.5"}', "expected margins by level"),
        ('{"other": 0.5}', r"expected the bundle's levels \(quick, usual, full\), got other"),
        ("\xff", "expected margins by level"),
    ],
)
def test_a_broken_file_of_margins(content: str, message: str, copy: Path) -> None:
    (copy / MARGINS_NAME).write_text(content, encoding="latin-1")
    with pytest.raises(BundleError, match=message):
        Pipeline.from_bundle(copy)


@pytest.mark.parametrize("level", ["other", "", 3, "QUICK"])
def test_an_unknown_level(level: Any, levelled: Path) -> None:
    with Pipeline.from_bundle(levelled, threads=1) as pipeline:
        with pytest.raises(ShapeError, match="level: expected auto or one of the bundle's levels"):
            pipeline.generate(random_picture(9, 9), "w1", level=level)
        with pytest.raises(ShapeError, match="level: expected"):
            pipeline.decide(random_picture(9, 9), Question.yes_no("w1"), level=level)


# Image forms


def _base_tiles() -> Iterator[Any]:
    onevision = {"max_grid_tiles": 2, "resize_mode": "stretch", "do_center_crop": False}
    common = {"kind": "anyres", "tile_size": 24, "patch_size": 8, "resize_size": 24}
    pinpoints = ((24, 48), (48, 24), (48, 48), (72, 24))
    yield pytest.param(LlavaImages(**common, grid_pinpoints=pinpoints), 0, id="llava-next")
    yield pytest.param(LlavaImages(**common, grid_pinpoints=pinpoints, **onevision), 0, id="onevision")
    yield pytest.param(InternVlImages(tile_size=32, tokens_per_side=2), -1, id="internvl")


@pytest.mark.parametrize(("images", "place"), [*_base_tiles()])
@pytest.mark.parametrize("size", [(60, 45), (37, 101), (24, 24), (150, 31)])
def test_the_base_form_is_the_tile_with_the_whole_image(
    images: Any, place: int, size: tuple[int, int]
) -> None:
    picture, base = random_picture(*size), at_form(images, "base")
    whole, alone = images.prepare(picture), base.prepare(picture)
    assert alone["pixel_values"].shape[0] == base.sizes(*size)["B"] == 1
    np.testing.assert_array_equal(alone["pixel_values"][0], whole["pixel_values"][place])
    assert base.sizes(*size)["N"] == len(alone["token_index"])
    assert base.layout(*size).num_visual == base.any_image_sizes()[0]["N"]
    again = type(images).from_dict(base.to_dict(), encoder_keep=None)
    assert again == base


@pytest.mark.parametrize("form", ["32x32", "96x64", "64x50", "low"])
def test_a_smaller_form_makes_fewer_tokens(form: str) -> None:
    qwen = Qwen3Images(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=65536, table_size=8
    )
    smol = SmolVlmImages(tile_size=32, token_size=16, longest_edge=128)
    intern = InternVlImages(tile_size=32, tokens_per_side=2)
    for images in (qwen, smol, intern):
        smaller = at_form(images, form)
        assert smaller.any_image_sizes()[-1]["N"] < images.any_image_sizes()[-1]["N"]
        for size in ((60, 45), (37, 101), (300, 200)):
            assert smaller.sizes(*size)["N"] <= images.sizes(*size)["N"]
            if re.fullmatch(r"\d+x\d+", form) and images is qwen:
                width, height = map(int, form.split("x"))
                assert smaller.sizes(*size)["N"] * 256 <= max(width * height, 256) + 256 * sum(size) // 16


def test_forms_that_a_model_lacks() -> None:
    single = LlavaImages(kind="single", tile_size=24, patch_size=8, resize_size=24)
    assert at_form(single, "low") == single
    for form in ("base", "48x48"):
        with pytest.raises(ScheduleError, match="--level: expected"):
            at_form(single, form)


# The choice of margins


def _sample(number: int, *, right: dict[str, bool], margin: dict[str, float]) -> Answered:
    flops: dict[tuple[str | None, str], float] = {
        (None, "low"): 1.0,
        (None, "high"): 4.0,
        ("low", "high"): 3.0,
    }
    return Answered(f"{number}", {name: float(value) for name, value in right.items()}, margin, flops)


def test_the_cheapest_chain_that_is_right_enough() -> None:
    # Of ten, the low level gets the three with small margins wrong.
    samples = [
        _sample(
            number,
            right={"low": number >= 3, "high": True},
            margin={"low": 0.1 * number, "high": 0.9},
        )
        for number in range(10)
    ]
    chain = best_chain(samples, ("low", "high"), accuracy=1.0, mean_flops=None)
    assert [*chain.margins] == ["low", "high"]
    assert chain.scores(samples) == [1.0] * 10
    assert [len(chain.stops(sample)) for sample in samples] == [2] * 3 + [1] * 7
    assert chain.flops_of(samples) == pytest.approx(1.0 + 0.3 * 3.0)
    cheap = best_chain(samples, ("low", "high"), accuracy=1.0, mean_flops=0.25 + 0.1 * 0.75)
    assert cheap.flops_of(samples) <= 1.3 + 1e-9
    assert sum(cheap.scores(samples)) == 8.0
    assert best_chain(samples, ("low", "high"), accuracy=0.7, mean_flops=None) == Chain({"low": 0.0})


def test_a_low_level_that_says_nothing_is_left_out() -> None:
    samples = [
        _sample(number, right={"low": False, "high": True}, margin={"low": 0.9, "high": 0.9})
        for number in range(6)
    ]
    assert best_chain(samples, ("low", "high"), accuracy=1.0, mean_flops=None) == Chain({"high": 0.0})
    assert msgspec.json.encode(Chain({"high": 0.0}).margins) == b'{"high":0.0}'
