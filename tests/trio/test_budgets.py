"""Schedules from presets, text and a wished average keep."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.budgets import (
    PRESETS,
    default_stage_layers,
    method_schedule,
    parse_keep,
    parse_schedule,
    preset_schedule,
    schedule_for_keep,
    with_probe_rows,
)


def _stages(schedule: Schedule) -> list[tuple[int, int]]:
    return [(stage.layer, stage.keep) for stage in schedule.stages]


@pytest.mark.parametrize(
    ("model", "keep", "stages", "average_tokens"),
    [
        ("llava-1.5-7b", "11.1%", [(1, 92), (10, 54), (15, 22)], 64),
        ("llava-1.5-7b", "22.2%", [(1, 218), (10, 128), (15, 54)], 128),
        ("llava-1.5-7b", "33.3%", [(1, 344), (10, 202), (15, 86)], 192),
        ("llava-next-7b", "11.1%", [(1, 460), (10, 270), (15, 110)], 320),
        ("llava-1.5-7b-encoder", "11.1%", [(16, 32)], 64),
        ("llava-1.5-7b-encoder", "22.2%", [(16, 64)], 128),
        ("llava-1.5-7b-encoder", "33.3%", [(16, 96)], 192),
    ],
)
def test_preset_keeps_its_average_exactly(
    model: str, keep: str, stages: list[tuple[int, int]], average_tokens: int
) -> None:
    assert _stages(preset_schedule(model, keep)) == stages
    (preset,) = (preset for preset in PRESETS[model] if preset.name == keep)
    assert preset.average_keep * preset.num_visual == pytest.approx(average_tokens, abs=1e-9)


def test_reference_script_for_llava_next_keeps_twelve_percent() -> None:
    assert PRESETS["llava-next-7b"][1].average_keep == pytest.approx(0.1196, abs=1e-4)


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match=r"expected one of 11\.1%, 22\.2%, 33\.3%, got '50%'"):
        preset_schedule("llava-1.5-7b", "50%")
    with pytest.raises(ScheduleError, match=r"expected one of llava-1\.5-7b, .*, got 'gpt'"):
        preset_schedule("gpt", "11.1%")


def test_schedule_text_gives_stages_and_passes_settings_through() -> None:
    schedule = parse_schedule(
        "1:460, 10:270,15:110", probe_rows="answer", nms_rounds=7, positions="preserved"
    )
    assert _stages(schedule) == [(1, 460), (10, 270), (15, 110)]
    assert (schedule.probe_rows, schedule.nms_rounds, schedule.positions) == ("answer", 7, "preserved")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected LAYER:KEPT pairs, got ''"),
        ("1:460,", "expected LAYER:KEPT pairs, got ''"),
        ("1=460", "expected LAYER:KEPT pairs, got '1=460'"),
        ("1:-4", "expected LAYER:KEPT pairs, got '1:-4'"),
        ("a:b", "expected LAYER:KEPT pairs, got 'a:b'"),
        ("0:5", "expected a layer >= 1"),
        ("1:0", r"expected to keep 1\.\.1048576 tokens, got 0"),
        ("5:40,3:20", "expected ascending layers"),
        ("3:20,5:40", "expected to keep < 20"),
    ],
)
def test_impossible_schedule_text_is_one_clear_line(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        parse_schedule(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("11.1%", 0.111), ("0.111", 0.111), (" 50 % ", 0.5), ("1", 1.0)])
def test_keep_is_a_percentage_or_a_fraction(text: str, value: float) -> None:
    assert parse_keep(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["11.1", "0", "0%", "-3%", "101%", "nan", "inf", "all", "%", ""])
def test_other_keeps_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError, match=r"expected a fraction in \(0, 1\]"):
        parse_keep(text)


@pytest.mark.parametrize(
    ("average", "num_visual", "stages"),
    [
        (0.111, 576, [(1, 92), (10, 54), (15, 22)]),
        (0.222, 576, [(1, 218), (10, 128), (15, 54)]),
        (1 / 3, 576, [(1, 344), (10, 202), (15, 86)]),
        (0.111, 2880, [(1, 460), (10, 270), (15, 110)]),
        (0.12, 2880, [(1, 436), (10, 255), (15, 173)]),
    ],
)
def test_known_shapes_get_their_preset(
    average: float, num_visual: int, stages: list[tuple[int, int]]
) -> None:
    assert _stages(schedule_for_keep(average, num_layers=32, num_visual=num_visual)) == stages


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [
        (32, (1, 10, 15)),
        (28, (1, 9, 13)),
        (40, (1, 13, 19)),
        (80, (3, 25, 38)),
        (8, (1, 3, 4)),
        (4, (1, 2, 3)),
        (3, (1, 2)),
        (2, (1,)),
        (1, ()),
    ],
)
def test_default_stage_layers_scale_with_the_depth(num_layers: int, layers: tuple[int, ...]) -> None:
    assert default_stage_layers(num_layers) == layers


@given(average=st.floats(0.02, 0.999), num_layers=st.integers(2, 60), num_visual=st.integers(8, 3000))
@settings(max_examples=40, deadline=None)
def test_average_keep_is_never_above_and_within_a_stage_of_the_wish(
    average: float, num_layers: int, num_visual: int
) -> None:
    try:
        schedule = schedule_for_keep(average, num_layers=num_layers, num_visual=num_visual)
    except ScheduleError:
        first = default_stage_layers(num_layers)[0]
        assert average * num_layers * num_visual < first * num_visual + num_layers - first + 1e-6
        return
    if any(abs(average - preset.average_keep) < 1e-3 for presets in PRESETS.values() for preset in presets):
        return  # a preset stands for its printed percentage, which may lie just below it
    spent = schedule.average_keep(num_layers=num_layers, num_visual=num_visual) * num_layers * num_visual
    assert spent <= average * num_layers * num_visual + 1e-5
    most = [num_visual - index for index in range(len(schedule.stages))]  # keeps decrease strictly
    at_most = [stage.keep for stage in schedule.stages] == most
    assert at_most or average * num_layers * num_visual - spent <= num_layers


@pytest.mark.parametrize(
    ("num_layers", "num_visual"), [(28, 1200), (32, 2000), (40, 2880)], ids=["qwen", "llama", "13b"]
)
def test_large_pictures_meet_the_wish_to_the_token(num_layers: int, num_visual: int) -> None:
    schedule = schedule_for_keep(0.15, num_layers=num_layers, num_visual=num_visual)
    spent = sum(schedule.tokens_per_layer(num_layers=num_layers, num_visual=num_visual))
    assert 0 <= 0.15 * num_layers * num_visual - spent < 1


def test_keeps_are_shaped_like_the_preset() -> None:
    keeps = [keep for _, keep in _stages(schedule_for_keep(0.2, num_layers=28, num_visual=1200))]
    assert keeps[0] / keeps[2] == pytest.approx(460 / 110, rel=0.05)
    assert keeps[1] / keeps[2] == pytest.approx(270 / 110, rel=0.05)


def test_keeping_everything_needs_no_stage() -> None:
    assert schedule_for_keep(1.0, num_layers=32, num_visual=576).stages == ()


def test_own_layers_are_used() -> None:
    assert [
        layer for layer, _ in _stages(schedule_for_keep(0.5, num_layers=12, num_visual=100, layers=(2, 6)))
    ] == [2, 6]


def test_settings_pass_through() -> None:
    given_settings: dict[str, Any] = {"probe_rows": "answer", "num_probe_rows": 2, "nms_threshold": 0.7}
    for schedule in (
        schedule_for_keep(0.111, num_layers=32, num_visual=576, **given_settings),
        schedule_for_keep(0.3, num_layers=8, num_visual=180, **given_settings),
        preset_schedule("llava-next-7b", "11.1%", **given_settings),
    ):
        assert (schedule.probe_rows, schedule.num_probe_rows, schedule.nms_threshold) == ("answer", 2, 0.7)


@pytest.mark.parametrize(
    ("average", "num_layers", "layers", "message"),
    [
        (
            0.1,
            8,
            None,
            r"keep 10\.0%: expected an average of at least 13\.\d% \(the first 1 of 8 layers see all",
        ),
        (0.5, 1, None, r"expected an average of at least 100\.0%"),
        (0.5, 8, (3, 3), r"stage layers: expected ascending layers in 1\.\.7, got 3, 3"),
        (0.5, 8, (3, 8), r"stage layers: expected ascending layers in 1\.\.7, got 3, 8"),
        (0.5, 8, (0, 3), r"stage layers: expected ascending layers in 1\.\.7, got 0, 3"),
        (1.5, 8, None, r"expected a fraction in \(0, 1\], got 1\.5"),
    ],
)
def test_impossible_wishes_are_one_clear_line(
    average: float, num_layers: int, layers: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        schedule_for_keep(average, num_layers=num_layers, num_visual=180, layers=layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keep", "rows"), [("9.4%", "answer"), ("10%", "reference"), ("11.1%", "reference"), ("5%", "answer")]
)
def test_probe_rows_follow_the_average_keep(keep: str, rows: str) -> None:
    schedule = schedule_for_keep(parse_keep(keep), num_layers=32, num_visual=576)
    chosen = with_probe_rows(schedule, num_layers=32, picture_tokens=576, entering=576)
    assert (chosen.probe_rows, chosen.stages) == (rows, schedule.stages)


def test_probe_rows_count_the_tokens_that_the_encoder_removed() -> None:
    schedule = schedule_for_keep(0.3, num_layers=32, num_visual=144)
    assert (
        with_probe_rows(schedule, num_layers=32, picture_tokens=144, entering=144).probe_rows == "reference"
    )
    assert with_probe_rows(schedule, num_layers=32, picture_tokens=576, entering=144).probe_rows == "answer"


def test_methods_without_a_probe_keep_their_settings() -> None:
    schedule = method_schedule("fastv", 0.08, num_layers=32, num_visual=576)
    assert with_probe_rows(schedule, num_layers=32, picture_tokens=576, entering=576) is schedule


def test_more_than_tensorrts_topk_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"expected to keep <= 3839 tokens"):
        schedule_for_keep(0.9, num_layers=32, num_visual=9000)
