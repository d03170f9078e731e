"""Schedules from presets, text and a wished average keep."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules import schedule_for
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.budgets import PRESETS, ScheduleRequest, default_layers, parse_keep, parse_stages


def _stages(schedule: Schedule) -> list[tuple[int, int]]:
    return [(stage.layer, stage.keep) for stage in schedule.stages]


@pytest.mark.parametrize(
    ("whole", "entering", "stages", "average_tokens"),
    [
        (576, 576, ((1, 92), (10, 54), (15, 22)), 64),
        (576, 576, ((1, 218), (10, 128), (15, 54)), 128),
        (576, 576, ((1, 344), (10, 202), (15, 86)), 192),
        (2880, 2880, ((1, 460), (10, 270), (15, 110)), 320),
        (576, 96, ((16, 32),), 64),
        (576, 192, ((16, 64),), 128),
        (576, 288, ((16, 96),), 192),
    ],
)
def test_preset_keeps_its_average_exactly(
    whole: int, entering: int, stages: tuple[tuple[int, int], ...], average_tokens: int
) -> None:
    assert stages in PRESETS[whole, entering]
    request = ScheduleRequest(average=average_tokens / whole)
    schedule = request.schedule(num_layers=32, num_visual=entering, image_tokens=whole)
    assert tuple(_stages(schedule)) == stages
    assert sum(schedule.tokens_per_layer(num_layers=32, num_visual=entering)) == 32 * average_tokens


def test_reference_script_for_llava_next_keeps_twelve_percent() -> None:
    script = ScheduleRequest(stages=PRESETS[2880, 2880][1]).schedule(num_layers=32, num_visual=2880)
    assert script.average_keep(num_layers=32, num_visual=2880) == pytest.approx(0.1196, abs=1e-4)


def test_schedule_text_gives_stages_and_passes_settings_through() -> None:
    request = ScheduleRequest(
        stages=parse_stages("1:460, 10:270,15:110"), probe_rows="answer", nms_rounds=7, positions="preserved"
    )
    schedule = request.schedule(num_layers=32, num_visual=2880)
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
        ScheduleRequest(stages=parse_stages(text))
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
    assert _stages(schedule_for(average, num_layers=32, num_visual=num_visual)) == stages


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
    assert next(iter(default_layers("trio", num_layers=num_layers)), ()) == layers


@given(average=st.floats(0.02, 0.999), num_layers=st.integers(2, 60), num_visual=st.integers(8, 3000))
@settings(max_examples=40, deadline=None)
def test_average_keep_is_never_above_and_within_a_stage_of_the_wish(
    average: float, num_layers: int, num_visual: int
) -> None:
    try:
        schedule = schedule_for(average, num_layers=num_layers, num_visual=num_visual)
    except ScheduleError:
        first = default_layers("trio", num_layers=num_layers)[0][0]
        assert average * num_layers * num_visual < first * num_visual + num_layers - first + 1e-6
        return
    if (num_layers, num_visual) in ((32, 576), (32, 2880)):
        return  # a preset stands for its printed percentage, which may lie just below it
    spent = schedule.average_keep(num_layers=num_layers, num_visual=num_visual) * num_layers * num_visual
    assert spent <= average * num_layers * num_visual + 1e-5
    # Keeps decrease strictly, and a stage that keeps everything is left out.
    most = [num_visual - 1 - index for index in range(len(schedule.stages))]
    at_most = [stage.keep for stage in schedule.stages] == most
    assert at_most or average * num_layers * num_visual - spent <= num_layers


@pytest.mark.parametrize(
    ("num_layers", "num_visual"), [(28, 1200), (32, 2000), (40, 2880)], ids=["qwen", "llama", "13b"]
)
def test_large_pictures_meet_the_wish_to_the_token(num_layers: int, num_visual: int) -> None:
    schedule = schedule_for(0.15, num_layers=num_layers, num_visual=num_visual)
    spent = sum(schedule.tokens_per_layer(num_layers=num_layers, num_visual=num_visual))
    assert 0 <= 0.15 * num_layers * num_visual - spent < 1


def test_keeps_are_shaped_like_the_preset() -> None:
    keeps = [keep for _, keep in _stages(schedule_for(0.2, num_layers=28, num_visual=1200))]
    assert keeps[0] / keeps[2] == pytest.approx(460 / 110, rel=0.05)
    assert keeps[1] / keeps[2] == pytest.approx(270 / 110, rel=0.05)


def test_keeping_everything_needs_no_stage() -> None:
    assert schedule_for(1.0, num_layers=32, num_visual=576).stages == ()


def test_own_layers_are_used() -> None:
    assert [
        layer for layer, _ in _stages(schedule_for(0.5, num_layers=12, num_visual=100, layers=(2, 6)))
    ] == [2, 6]


def test_settings_pass_through() -> None:
    given_settings: dict[str, Any] = {"probe_rows": "answer", "num_probe_rows": 2, "nms_threshold": 0.7}
    for schedule in (
        schedule_for(0.111, num_layers=32, num_visual=576, **given_settings),
        schedule_for(0.3, num_layers=8, num_visual=180, **given_settings),
        schedule_for(0.111, num_layers=32, num_visual=2880, **given_settings),
    ):
        assert (schedule.probe_rows, schedule.num_probe_rows, schedule.nms_threshold) == ("answer", 2, 0.7)


@pytest.mark.parametrize(
    ("average", "num_layers", "layers", "message"),
    [
        (
            0.1,
            8,
            None,
            r"keep 10\.0%: expected an average of at least 13\.\d% for trio \(the first 1 of 8 layers see all",
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
        schedule_for(average, num_layers=num_layers, num_visual=180, layers=layers)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keep", "rows"), [("9.4%", "answer"), ("10%", "reference"), ("11.1%", "reference"), ("5%", "answer")]
)
def test_probe_rows_follow_the_average_keep(keep: str, rows: str) -> None:
    schedule = schedule_for(parse_keep(keep), num_layers=32, num_visual=576)
    assert schedule.probe_rows == rows
    given = schedule_for(parse_keep(keep), num_layers=32, num_visual=576, probe_rows="answer")
    assert (given.probe_rows, given.stages) == ("answer", schedule.stages)


def test_probe_rows_count_the_tokens_that_the_encoder_removed() -> None:
    request = ScheduleRequest(stages=((1, 60), (2, 9)))
    assert request.schedule(num_layers=32, num_visual=144).probe_rows == "reference"
    assert request.schedule(num_layers=32, num_visual=144, image_tokens=576).probe_rows == "answer"


def test_methods_without_a_probe_keep_their_settings() -> None:
    assert schedule_for(0.08, method="fastv", num_layers=32, num_visual=576).probe_rows == "reference"


def test_positions_are_the_methods_where_the_model_allows_them() -> None:
    request = ScheduleRequest(method="fastv", average=0.5)
    for allowed, expected in (
        ((), "preserved"),
        (("compact", "preserved"), "preserved"),
        (("compact",), "compact"),
    ):
        schedule = request.schedule(num_layers=32, num_visual=576, positions=allowed)
        assert schedule.positions == expected


def test_a_request_like_a_schedule_has_its_method_and_settings() -> None:
    schedule = schedule_for(0.5, method="fastv", num_layers=32, num_visual=576, num_probe_rows=2)
    other = ScheduleRequest.like(schedule, average=0.25).schedule(num_layers=32, num_visual=576)
    assert other == schedule_for(0.25, method="fastv", num_layers=32, num_visual=576, num_probe_rows=2)
    none = ScheduleRequest.like(schedule, average=None).schedule(num_layers=32, num_visual=576)
    assert none == msgspec.structs.replace(schedule, stages=())


def test_a_strict_average_above_what_enters_the_decoder_is_refused() -> None:
    sizes = {"num_layers": 32, "num_visual": 96, "image_tokens": 576}
    assert ScheduleRequest(average=0.5).schedule(**sizes).stages == ()
    with pytest.raises(ScheduleError, match=r"--keep: expected at most 16\.7%, .* got 50%; give 'all'"):
        ScheduleRequest(average=0.5, is_strict=True).schedule(**sizes)


def test_more_than_tensorrts_topk_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"expected to keep <= 3839 tokens"):
        schedule_for(0.9, num_layers=32, num_visual=9000)
