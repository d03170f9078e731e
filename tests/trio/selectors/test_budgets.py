"""Every method gets the same true average, at its own layers."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.schedules import schedule_for
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio.budgets import ScheduleRequest, default_layers
from trio_edge.trio.methods import stage_method

OTHERS: tuple[str, ...] = ("fastv", "pyramiddrop", "dart", "sparsevlm")
LLAVA = {"num_layers": 32, "num_visual": 576}


def _stages(method: str, average: float, **sizes: int) -> list[tuple[int, int]]:
    schedule = schedule_for(average, method=method, **{**LLAVA, **sizes})
    return [(stage.layer, stage.keep) for stage in schedule.stages]


@pytest.mark.parametrize(
    ("method", "average", "stages"),
    [
        ("fastv", 192 / 576, [(2, 166)]),
        ("fastv", 128 / 576, [(2, 98)]),
        ("fastv", 64.125 / 576, [(2, 30)]),
        ("dart", (2 * 576 + 30 * 188) / 32 / 576, [(2, 188)]),
        ("pyramiddrop", 270 / 576, [(8, 288), (16, 144), (24, 72)]),
        ("sparsevlm", 6608 / 32 / 576, [(3, 309), (7, 204), (16, 113)]),
        ("sparsevlm", 2632 / 32 / 576, [(3, 82), (7, 32), (16, 18)]),
    ],
)
def test_published_budgets_give_the_published_stages(
    method: str, average: float, stages: list[tuple[int, int]]
) -> None:
    got = _stages(method, average)
    assert [layer for layer, _ in got] == [layer for layer, _ in stages]
    assert all(abs(a - b) <= 1 for (_, a), (_, b) in zip(got, stages))


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("average", [1 / 3, 2 / 9, 1 / 9])
@pytest.mark.parametrize(("num_layers", "num_visual"), [(32, 576), (32, 2880), (28, 1296), (16, 144)])
def test_the_budget_is_spent_to_less_than_one_token_of_the_shortest_step(
    method: str, average: float, num_layers: int, num_visual: int
) -> None:
    schedule = schedule_for(average, method=method, num_layers=num_layers, num_visual=num_visual)
    spent = sum(schedule.tokens_per_layer(num_layers=num_layers, num_visual=num_visual))
    budget = average * num_layers * num_visual
    ends = [*[stage.layer for stage in schedule.stages][1:], num_layers]
    shortest = min(end - stage.layer for stage, end in zip(schedule.stages, ends))
    assert budget - shortest < spent <= budget + 1e-6


@given(
    method=st.sampled_from(OTHERS), average=st.floats(0.01, 0.99), num_layers=st.integers(2, 80),
    num_visual=st.integers(1, 3000),
)  # fmt: skip
def test_no_schedule_is_above_its_budget(
    method: str, average: float, num_layers: int, num_visual: int
) -> None:
    try:
        schedule = schedule_for(average, method=method, num_layers=num_layers, num_visual=num_visual)
    except ScheduleError:
        assume(False)
        raise
    spent = sum(schedule.tokens_per_layer(num_layers=num_layers, num_visual=num_visual))
    assert spent <= average * num_layers * num_visual + 1e-5
    schedule.check_fits(num_layers=num_layers, max_visual=num_visual)


@pytest.mark.parametrize(
    ("method", "layers"),
    [("fastv", (2,)), ("dart", (2,)), ("pyramiddrop", (8, 16, 24)), ("sparsevlm", (3, 7, 16))],
)
def test_default_layers_of_32_are_the_published_ones(method: str, layers: tuple[int, ...]) -> None:
    assert default_layers(method, num_layers=32)[0] == layers


def test_other_depths_scale_the_layers() -> None:
    assert default_layers("pyramiddrop", num_layers=28)[0] == (7, 14, 21)
    assert default_layers("sparsevlm", num_layers=28)[0] == (3, 6, 14)
    assert default_layers("sparsevlm", num_layers=3)[0] == (1, 2)


def test_stages_move_forward_only_where_the_budget_needs_it() -> None:
    assert _stages("fastv", 1 / 9, num_layers=16)[0][0] == 1
    assert _stages("fastv", 2 / 9, num_layers=16)[0][0] == 2
    assert [_stages("pyramiddrop", average)[0][0] for average in (1 / 3, 2 / 9, 1 / 9)] == [8, 5, 2]


def test_pyramid_keeps_follow_one_ratio() -> None:
    keeps = [576, *[keep for _, keep in _stages("pyramiddrop", 1 / 9)]]
    ratios = [later / earlier for earlier, later in zip(keeps, keeps[1:])]
    assert max(ratios) - min(ratios) < 0.03
    assert min(ratios) > 0.25


def test_stages_can_be_given() -> None:
    schedule = schedule_for(0.5, method="fastv", layers=(5,), **LLAVA)
    assert [(stage.layer, stage.keep) for stage in schedule.stages] == [(5, 234)]


def test_positions_and_method_are_the_originals() -> None:
    for method in OTHERS:
        schedule = schedule_for(0.5, method=method, **LLAVA)
        assert (schedule.method, schedule.positions) == (method, stage_method(method).positions)
    assert schedule_for(0.5, method="fastv", positions="compact", **LLAVA).positions == "compact"


def test_everything_kept_has_no_stage() -> None:
    assert schedule_for(1.0, method="dart", **LLAVA).stages == ()


@pytest.mark.parametrize(
    ("method", "average", "sizes", "message"),
    [
        ("sparsevlm", 0.02, {}, r"at least 3.3% for sparsevlm \(the first 1 of 32 layers"),
        ("fastv", 0.5, {"num_layers": 1}, "at least 100.0% for fastv"),
        ("dart", 0.9, {"num_visual": 9000}, "expected to keep <= 3839 tokens"),
    ],
)
def test_impossible_budgets_are_refused(
    method: str, average: float, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule_for(average, method=method, **{**LLAVA, **sizes})


def test_given_layers_must_lie_in_the_decoder() -> None:
    with pytest.raises(ScheduleError, match=r"expected ascending layers in 1..31, got 32"):
        schedule_for(0.5, method="fastv", layers=(32,), **LLAVA)


@pytest.mark.parametrize(
    ("method", "average", "entering", "stages"),
    [
        ("trio", 0.111, 96, [(16, 32)]),
        ("trio", 0.222, 192, [(16, 64)]),
        ("trio", 0.111, 100, [(16, 27)]),
        ("trio", 0.111, 64, []),
        ("trio", 0.05, 32, [(16, 25)]),
        ("fastv", 0.1, 96, [(2, 55)]),
    ],
)
def test_behind_another_reduction_the_average_is_still_one_of_all_tokens(
    method: str, average: float, entering: int, stages: list[tuple[int, int]]
) -> None:
    """The first two are the paper's schedules with encoder reduction."""
    schedule = ScheduleRequest(method=method, average=average).schedule(
        num_layers=32, num_visual=entering, image_tokens=576
    )
    assert [(stage.layer, stage.keep) for stage in schedule.stages] == stages
    spent = sum(schedule.tokens_per_layer(num_layers=32, num_visual=entering))
    assert spent <= (average + 0.0005) * 32 * 576


def test_too_small_a_rest_for_one_stage_halfway_takes_the_usual_ones() -> None:
    schedule = ScheduleRequest(average=0.1).schedule(num_layers=32, num_visual=300, image_tokens=576)
    assert [stage.layer for stage in schedule.stages] == [1, 10, 15]


def test_without_another_reduction_the_schedule_is_the_methods_own() -> None:
    request = ScheduleRequest(average=1 / 9)
    assert request.schedule(**LLAVA, image_tokens=576) == request.schedule(**LLAVA)
