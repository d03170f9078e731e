"""Predicted times: what must grow and shrink, how near published figures are, and one line for every wrong option."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from rich.console import Console

from tests.schedules import schedule_of
from trio_edge.profiling import cli as cli_profile
from trio_edge.profiling.predict.answer import graph_runs, predict
from trio_edge.profiling.predict.models import MODELS
from trio_edge.profiling.predict.plan import plan_for
from trio_edge.profiling.predict.speed import FITTED, Formats, Rates, fitted_for, graph_time, rates_of
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.cli.tables import print_table, wide_console
from trio_edge.trio.cost.bundle_work import graph_work
from trio_edge.trio.cost.devices import DEVICES
from trio_edge.trio.cost.work import range_work

if TYPE_CHECKING:
    from trio_edge.profiling.predict.answer import Prediction

ORIN = DEVICES["jetson-agx-orin-64"]
NX = DEVICES["jetson-orin-nx-16"]
LLAMA = MODELS["llava-next-7b"].decoder
HALF = Formats()


def predicted(**wishes: Any) -> Prediction:
    """LLaVA-NeXT-7B on an AGX Orin, or as wished."""
    target = wishes.pop("target", ORIN)
    return predict(plan_for(**{"model": "llava-next-7b", **wishes}), target)


def layer_seconds(*, rows: int, past: int = 0, rates: Rates | None = None) -> float:
    work = range_work(LLAMA, layers=range(1), rows=rows, past=past)
    efficiency = fitted_for(ORIN).efficiency
    return graph_time(work, formats=HALF, rates=rates or rates_of(ORIN), efficiency=efficiency).seconds


# What a prediction must obey


def test_more_rows_and_a_longer_context_never_take_less_time() -> None:
    by_rows = [layer_seconds(rows=rows) for rows in range(16, 3000, 37)]
    by_context = [layer_seconds(rows=1, past=past) for past in range(0, 3000, 37)]
    assert by_rows == sorted(by_rows)
    assert by_context == sorted(by_context)


def test_outlier_columns_are_read_next_to_the_int4_weights() -> None:
    work, efficiency = range_work(LLAMA, layers=range(1), rows=1, past=0), fitted_for(ORIN).efficiency
    plain, some, half = (
        graph_time(work, formats=formats, rates=rates_of(ORIN), efficiency=efficiency).memory_seconds
        for formats in (Formats(layer="int4"), Formats(layer="int4", outliers=0.1), HALF)
    )
    assert some - plain == pytest.approx(0.2 / (2 - 4.125 / 8) * (half - plain))


@pytest.mark.parametrize("field", ["flops", "bandwidth"])
def test_a_faster_device_never_takes_more_time(field: str) -> None:
    rates = rates_of(ORIN)
    faster = dataclasses.replace(rates, **{field: 2 * getattr(rates, field)})
    for rows in (1, 64, 1024):
        assert layer_seconds(rows=rows, rates=faster) <= layer_seconds(rows=rows)


def test_prefill_is_bound_by_arithmetic_and_decode_by_memory() -> None:
    bounds = {(timed.run.name, timed.run.phase): timed.time.bound for timed in predicted().runs}
    assert bounds["prefix", "prefill"] == "compute"
    assert bounds["prefix", "decode"] == "memory"


def test_fewer_tokens_answer_sooner_and_need_smaller_caches() -> None:
    ladder = [predicted(keep=keep) for keep in ("100%", "33.3%", "22.2%", "11.1%")]
    times = [prediction.seconds("prefill") for prediction in ladder]
    caches = [prediction.memory.kv_caches for prediction in ladder]
    assert times == sorted(times, reverse=True)
    assert caches == sorted(caches, reverse=True)
    assert times[0] / times[-1] > 4


@pytest.mark.parametrize("keep", ["100%", "11.1%"])
def test_a_tokens_time_grows_on_a_line_with_the_rows_of_the_caches(keep: str) -> None:
    room = (1000, 2000, 4000)
    times = [predicted(keep=keep, num_text=64, num_new=rows).seconds("decode") for rows in room]
    cached = 32 * 2 * 4096 * 2  # bytes of a row in all layers
    per_row = cached / (rates_of(ORIN).bandwidth * fitted_for(ORIN).efficiency.bandwidth)
    assert times[1] - times[0] == pytest.approx(1000 * per_row)
    assert times[2] - times[1] == pytest.approx(2000 * per_row)


def test_int4_decodes_faster_and_prefills_no_slower() -> None:
    half, fourth = predicted(), predicted(precision="int4")
    assert fourth.seconds("decode") < 0.5 * half.seconds("decode")
    assert fourth.seconds("prefill") <= half.seconds("prefill")


def test_attention_that_is_not_one_kernel_costs_more_the_more_tokens_there_are() -> None:
    assert predicted().unfused_seconds > 5 * predicted(keep="11.1%").unfused_seconds > 0


def test_a_7b_model_in_float16_does_not_fit_an_orin_nx_and_in_int4_it_does() -> None:
    assert not predicted(target=NX).memory.fits
    assert predicted(target=NX, precision="int4").memory.fits


# Published figures


@pytest.mark.parametrize("kind", FITTED)
def test_published_times_are_within_the_errors_that_are_stated(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from predict_validation import predicted_ms, read_figures

    figures, known = read_figures()
    chosen = [entry for entry in figures if entry.kind == kind]
    fitted = FITTED[kind]
    errors = sorted(abs(predicted_ms(entry, fitted.efficiency, known) / entry.ms - 1) for entry in chosen)
    assert len(chosen) == fitted.num_figures
    assert {entry.device for entry in chosen} == set(fitted.devices)
    assert statistics.median(errors) <= fitted.new_model.median + 0.005
    assert errors[math.ceil(0.9 * len(errors)) - 1] <= fitted.new_model.nine_in_ten + 0.005


# Plans


def test_a_bundle_is_predicted_with_its_own_graphs_in_their_order(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    prediction = predict(plan_for(manifest=manifest), ORIN)
    prefill = [timed.run.name for timed in prediction.runs if timed.run.phase == "prefill"]
    assert prefill == [graph.name for graph in manifest.graphs]
    assert prediction.setting.visual_rows == (
        manifest.max_visual,
        *(stage.keep for stage in manifest.schedule.stages),
    )


@pytest.mark.parametrize("num_text", [4, 32, 33])
def test_a_bundle_is_predicted_at_the_profiles_that_a_prompt_runs_at(
    num_text: int, reduced_bundle: Path
) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    bucket = 32 if num_text <= 32 else 64
    for run in graph_runs(plan_for(manifest=manifest, num_text=num_text)):
        graph = manifest.graph(run.name)
        wanted = "decode" if run.phase == "decode" else f"prefill_{bucket}"
        profile = next((entry for entry in graph.profiles if entry.name == wanted), graph.profiles[-1])
        flops = graph_work(manifest, graph, profile).flops
        if graph.role == "select":  # a selection is predicted with its probe
            layers = manifest.ranges[manifest.selects.index(graph) + 1]
            for owner, name in zip(
                (layers, manifest.graph("head"), layers),
                (f"probe_{bucket}", "gradient", f"saliency_{bucket}"),
            ):
                half = next(entry for entry in owner.profiles if entry.name == name)
                flops += graph_work(manifest, owner, half).flops
        assert run.work.flops == flops, run


def test_a_model_without_a_bundle_has_the_exporters_usual_buckets() -> None:
    times = [predicted(num_text=count).seconds("prefill") for count in (33, 64, 65, 257, 300)]
    assert times[0] == times[1] < times[2] < times[3] < times[4]


def test_an_image_with_fewer_tokens_than_a_bundle_keeps_is_refused(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    keeps_most = msgspec.structs.replace(manifest, schedule=schedule_of("1:40,2:6"))
    with pytest.raises(ScheduleError, match=r"layer 1: expected to keep <= 24 .* got 40"):
        plan_for(manifest=keeps_most, image_size=(24, 24))


# The command


def test_the_command_says_that_it_predicts_and_how_far_off_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_profile.main(["--model", "llava-next-7b", "--predict", "agx-orin-64", "--keep", "11.1%"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "PREDICTED, nothing was measured" in text
    assert "114 published times of other runtimes" in text
    assert "2928 > 467 > 273 > 112 visual tokens, 40 text in 64 rows, 16 new" in text


def test_all_predicts_every_device_and_json_has_every_graph(
    reduced_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prediction.json"
    assert cli_profile.main([str(reduced_bundle), "--predict", "all", "--json", str(file)]) == 0
    values = json.loads(file.read_text())
    assert values["prediction"] is True
    assert {entry["device"] for entry in values["found"]} == set(DEVICES)
    first = values["found"][0]
    prefill = sum(graph["milliseconds"] for graph in first["graphs"] if graph["phase"] == "prefill")
    assert prefill == pytest.approx(first["ttft_ms"])
    assert "none of them is of rtx-3090" in " ".join(capsys.readouterr().out.split())


def test_the_docs_name_every_key_of_a_predictions_json(tmp_path: Path) -> None:
    file = tmp_path / "prediction.json"
    arguments = [*MODEL, "--keep", "11.1%", "--json", str(file)]
    assert cli_profile.main(arguments) == 0
    text = (Path(__file__).parents[2] / "docs/prediction.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[`\"](\w+)[`\"]", text))
    assert set(re.findall(r'"(\w+)":', file.read_text())) <= named


def test_a_device_that_is_named_twice_is_predicted_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_profile.main(["--model", "internvl3-1b", "--predict", "orin-nx-16,jetson-orin-nx-16"]) == 0
    assert capsys.readouterr().out.count("first token") == 1


def test_a_bundle_fills_its_own_buffers_whatever_is_asked(reduced_bundle: Path) -> None:
    manifest = open_bundle(reduced_bundle).manifest
    short, longer = (plan_for(manifest=manifest, num_text=text) for text in (4, 33))
    assert short.room == longer.room == manifest.text_buckets[-1] + manifest.max_new_tokens
    assert predict(short, ORIN).seconds("decode") == predict(longer, ORIN).seconds("decode")
    assert predict(short, ORIN).seconds("prefill") < predict(longer, ORIN).seconds("prefill")
    assert plan_for(manifest=manifest, num_new=4000).room == manifest.text_buckets[-1] + 4000


MODEL = ["--model", "llava-1.5-7b", "--predict", "agx-orin-64"]
WRONG = {
    "device": (["--model", "llava-1.5-7b", "--predict", "orin-nx"], "did you mean orin-nx-16?"),
    "model": (["--model", "llava-1.5-8b", "--predict", "all"], "did you mean llava-1.5-7b"),
    "neither bundle nor model": (["--predict", "all"], "expected a BUNDLE or --model NAME, got none"),
    "both": (["bundle", *MODEL], "expected a BUNDLE or --model NAME, got both"),
    "no bundle at all": ([], "BUNDLE: expected a bundle folder, got none"),
    "option without --predict": (
        ["bundle", "--keep", "11.1%"],
        "--keep: expected --predict DEVICE with it",
    ),
    "image size": ([*MODEL, "--image-size", "672"], "expected WIDTHxHEIGHT in pixels, got '672'"),
    "endless text": ([*MODEL, "--text", "1048577"], "--text: expected 1..1048576 tokens, got 1048577"),
    "keep": ([*MODEL, "--keep", "lots"], "expected a fraction"),
    "impossible keep": ([*MODEL, "--keep", "0.1%"], "expected an average of at least"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line_and_exit_code_2(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected = WRONG[case]
    assert cli_profile.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert expected in error


def test_tables_are_as_wide_as_a_terminal_and_wide_in_pipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert wide_console().width == 160
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard output counts as a terminal
    assert wide_console().width == 70


@pytest.mark.parametrize(("width", "names"), [(30, ["graph", "ms"]), (60, ["graph", "calls", "ms"])])
def test_a_narrow_terminal_loses_columns_that_matter_less_and_no_part_of_a_cell(
    width: int, names: list[str]
) -> None:
    console = Console(width=width, file=io.StringIO())
    print_table(
        console,
        ("graph", "calls", "ms"),
        [("a_graph_with_a_long_name", "17", "3.141592"), ("outside",)],
        less=("calls",),
    )
    assert isinstance(console.file, io.StringIO)
    lines = [re.split("[│┃]", line)[1:-1] for line in console.file.getvalue().splitlines()]
    rows = [[cell.strip() for cell in cells] for cells in lines if cells]
    assert rows[0] == names
    assert "".join(row[0] for row in rows[1:]) == "a_graph_with_a_long_nameoutside"
    assert "3.141592" in [row[-1] for row in rows]


def test_files_are_written_before_anything_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReachedError(Exception):
        """Standard output was written to."""

    def close() -> None:
        raise ReachedError

    monkeypatch.setattr(cli_profile, "wide_console", close)
    with pytest.raises(ReachedError):
        cli_profile.main([*MODEL, "--json", str(tmp_path / "json")])
    assert json.loads((tmp_path / "json").read_bytes())["prediction"] is True
