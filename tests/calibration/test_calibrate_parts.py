"""The parts of a calibration that need no model: samples, shapes, fronts, bounds and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.question_files import questions_about, write_questions
from tests.pictures import random_picture
from tests.schedules import schedule_of
from trio_edge.calibration.json_lines import ResultFile
from trio_edge.calibration.model.greedy import MeasuredSchedule
from trio_edge.calibration.model.prompts import SampleShape
from trio_edge.calibration.progress import StepProgress
from trio_edge.calibration.search.bundle_shape import image_sizes, rounds_with_margin, text_buckets
from trio_edge.calibration.search.calibrate import _warn_above, accuracy
from trio_edge.calibration.search.calibration_file import Fidelity, Measure, read_options
from trio_edge.calibration.search.measuring import MeasuredLine
from trio_edge.calibration.search.options import CalibrationOptions
from trio_edge.calibration.search.samples import read_samples, split_samples
from trio_edge.calibration.search.schedules.prefill_cost import PrefillCost, ScheduleCost, Situation
from trio_edge.calibration.search.schedules.search import (
    Candidate,
    cheapest_within,
    first_fronts,
    pareto_front,
)
from trio_edge.calibration.search.schedules.space import make_space
from trio_edge.profiling.predict.answer import Setting, predict
from trio_edge.profiling.predict.models import find_model
from trio_edge.runtime.bundle.errors import DataError, ScheduleError
from trio_edge.runtime.bundle.schedule import Schedule
from trio_edge.trio.cost.devices import find_device

MODEL = find_model("llava-next-7b")
SIZES = {"B": 5, "N": 2880}
SPACE = make_space(num_layers=32, num_visual=2880, layers=(1, 10, 15), keeps=(0.04, 0.1, 0.3), max_stages=3)


def sample(num_visual: int, num_text: int, *, size: tuple[int, int] = (48, 48)) -> SampleShape:
    return SampleShape(
        where="samples.jsonl:1", width=size[0], height=size[1], sizes={"N": num_visual}, num_text=num_text
    )


def cost_on(target: str, *situations: Situation) -> PrefillCost:
    return PrefillCost(
        decoder=MODEL.decoder, vision=MODEL.vision, situations=situations, target=find_device(target)
    )


def candidate(stages: str | None, *, kl: float) -> Candidate:
    schedule = Schedule() if stages is None else schedule_of(stages)
    cost = cost_on("orin-nx-16", Situation(1.0, SIZES, 40)).of(schedule).milliseconds
    return Candidate(schedule=schedule, cost=cost, kls=[0.9 * kl, 1.1 * kl], images=["a", "b"])


def test_samples_may_lack_answers(tmp_path: Path) -> None:
    lines = questions_about(3)
    del lines[1]["answer"]
    questions = read_samples(str(write_questions(tmp_path, lines)), prompt=None, count=None)
    assert [question.answers for question in questions] == [("w0",), (), ("w2",)]


def test_samples_without_answers_have_no_accuracy(tmp_path: Path) -> None:
    lines = [{key: line[key] for key in ("image", "question")} for line in questions_about(2)]
    questions = read_samples(str(write_questions(tmp_path, lines)), prompt=None, count=None)
    never: Any = None
    assert accuracy(never, questions, Schedule(), never) is None


def test_a_folder_of_images_is_asked_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.png", "deep/a.jpg")):
        random_picture(48, 48, seed=number).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    questions = read_samples(str(tmp_path), prompt="w1 ?", count=None)
    assert [question.sample_id for question in questions] == ["b.png", "deep/a.jpg"]
    assert {question.question for question in questions} == {"w1 ?"}


def test_no_image_is_on_both_sides_of_the_split(tmp_path: Path) -> None:
    path = write_questions(tmp_path, questions_about(12))
    questions = read_samples(str(path), prompt=None, count=None)
    split = split_samples(questions, held_out=0.3, seed=0)
    sides = [{question.image_id for question in side} for side in split]
    assert not sides[0] & sides[1]
    assert (len(split.search), len(split.held_out)) == (8, 4)
    assert split == split_samples(questions, held_out=0.3, seed=0)
    assert any(split != split_samples(questions, held_out=0.3, seed=seed) for seed in range(1, 6))


def test_text_buckets_have_room_to_spare_and_short_ones_where_they_pay() -> None:
    assert text_buckets([sample(2880, 20), sample(2880, 60)], room=999) == (80,)
    assert text_buckets([sample(50, 9)] * 99 + [sample(50, 60)], room=999) == (16, 80)


def test_text_buckets_have_no_more_room_to_spare_than_the_model_has() -> None:
    assert text_buckets([sample(2880, 60)], room=75) == (72,)
    assert text_buckets([sample(2880, 60)], room=61) == (64,)  # refused later, in words


def test_image_sizes_cover_the_largest_and_the_common_ones() -> None:
    common, rare = sample(100, 9, size=(64, 48)), sample(60, 9, size=(48, 64))
    assert image_sizes([common, common, rare]) == ((64, 48), (48, 64))
    assert image_sizes([common] * 99 + [rare]) == ((64, 48),)
    other = sample(100, 9, size=(65, 48))
    assert image_sizes([other, common, common]) == ((64, 48),)


@pytest.mark.parametrize(("largest", "rounds"), [(1, 3), (8, 10), (20, 25)])
def test_rounds_have_a_margin(largest: int, rounds: int) -> None:
    assert rounds_with_margin(largest) == rounds


def test_a_front_holds_what_nothing_cheaper_beats() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 4.0), (3.0, 4.5), (4.0, 1.0)]
    assert pareto_front(points, key=lambda point: point) == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]
    assert first_fronts(points, key=lambda point: point, count=4)[3:] == [(3.0, 4.5)]
    assert first_fronts(points, key=lambda point: point, count=2) == [(1.0, 5.0), (4.0, 1.0)]


def test_a_space_lists_each_order_of_layers_and_budgets_once() -> None:
    lists = list(SPACE.stage_lists())
    assert len(lists) == 9 + 9 + 1
    assert lists[-1] == ((1, 864), (10, 288), (15, 115))
    assert len(set(lists)) == len(lists)


def test_neighbours_are_possible_schedules_one_step_away() -> None:
    spread = make_space(num_layers=32, num_visual=2880, layers=(), keeps=(0.04, 0.1, 0.3), max_stages=3)
    schedule = schedule_of("1:864,10:288", nms_threshold=0.7)
    near = spread.neighbours(schedule)
    assert schedule_of("2:864,10:288", nms_threshold=0.7) in near
    assert schedule_of("1:864,10:360", nms_threshold=0.7) in near
    assert schedule_of("10:288", nms_threshold=0.7) in near
    assert schedule not in near
    for other in near:
        other.check_fits(num_layers=32, max_visual=2880)


def test_no_stage_is_moved_to_a_layer_that_was_not_named() -> None:
    schedule = schedule_of("1:864,10:288")
    near = SPACE.neighbours(schedule)
    assert {stage.layer for other in near for stage in other.stages} == {1, 10, 15}
    assert schedule_of("1:864,15:288") in near
    assert SPACE.allows(schedule)
    assert not SPACE.allows(schedule_of("1:864,9:288"))


def test_more_stages_than_allowed_are_no_candidate() -> None:
    one = make_space(num_layers=32, num_visual=2880, layers=(), keeps=(0.1,), max_stages=1)
    assert one.allows(schedule_of("9:288"))
    assert not one.allows(schedule_of("9:288,12:96"))


@pytest.mark.parametrize("target", ["jetson-orin-nx-16", "rtx-4090"])
@pytest.mark.parametrize("stages", [None, "15:115", "1:460,10:270,15:110"])
def test_costs_are_those_of_trio_profiles_prediction(target: str, stages: str | None) -> None:
    schedule = Schedule() if stages is None else schedule_of(stages)
    setting = Setting(
        model=MODEL,
        schedule=schedule,
        sizes=SIZES,
        num_text=40,
        text_bucket=40,
        num_new=1,
    )
    prediction = predict(setting, find_device(target))
    cost = cost_on(target, Situation(1.0, SIZES, 40)).of(schedule)
    assert cost.milliseconds == pytest.approx(1e3 * prediction.seconds("prefill"))
    prefill = [timed.run.work.flops for timed in prediction.runs if timed.run.phase == "prefill"]
    assert cost.flops == pytest.approx(sum(prefill))


def test_the_cost_is_the_mean_over_the_samples_shapes() -> None:
    small = Situation(1.0, {"B": 3, "N": 1000}, 32)
    large = Situation(1.0, SIZES, 64)
    both = cost_on("orin-nx-16", small._replace(share=0.25), large._replace(share=0.75))
    schedule = schedule_of("5:300")
    apart = [cost_on("orin-nx-16", situation).of(schedule) for situation in (small, large)]
    expected = ScheduleCost(0.0, 0.0).plus(apart[0], 0.25).plus(apart[1], 0.75)
    assert both.of(schedule) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bound", "chosen"),
    [
        (0.05, "1:460"),
        (0.043, "10:270"),  # 0.04 is not within it with 95 % confidence
        (0.005, None),
    ],
)
def test_the_cheapest_within_the_bound_is_chosen(bound: float, chosen: str | None) -> None:
    candidates = [candidate(None, kl=0.0), candidate("10:270", kl=0.02), candidate("1:460", kl=0.04)]
    candidates.append(candidate("1:110", kl=0.3))
    expected = Schedule() if chosen is None else schedule_of(chosen)
    assert cheapest_within(candidates, bound).schedule == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "orin"}, "--target: expected one of"),
        ({"held_out": 1.0}, "--held-out: expected a share"),
        ({"nms_thresholds": (0.0,)}, "--nms-thresholds: expected values"),
        ({"answer_tokens": 0}, "--answer-tokens: expected 1..64, got 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens: expected 1 or more, got 0"),
        ({"count": 1}, "--count: expected 2 or more samples, got 1"),
        ({"seed": -1}, "--seed: expected a number of 0 or more, got -1"),
        ({"max_kl": float("inf")}, "--max-kl: expected nats"),  # JSON has no such number
    ],
)
def test_impossible_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ScheduleError, ValueError), match=message):
        CalibrationOptions(**{"model": "tiny", "samples": "shapes", "target": "orin-nx-16", **settings})


def test_options_alone_are_a_config(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    wanted = {"model": "tiny", "samples": "shapes", "target": "orin-nx-16", "layers": [1, 4]}
    path.write_text(json.dumps({"options": wanted}))
    assert read_options(path) == (CalibrationOptions(**{**wanted, "layers": (1, 4)}), None)
    path.write_text(json.dumps({"options": {**wanted, "layer": 3}}))
    with pytest.raises(DataError, match=r"expected a calibration\.json"):
        read_options(path)
    path.write_text(json.dumps({"options": wanted, "data": {"sha256": 5}}))
    with pytest.raises(DataError, match=r"Expected `str \| null`"):
        read_options(path)


def test_a_record_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with Path("/dev/full").open("ab", buffering=0) as full:
        record = ResultFile(full, tmp_path / "measurements.jsonl")
        with pytest.raises(
            DataError, match=r"measurements\.jsonl: expected space for one more line, got none"
        ):
            record.append(MeasuredLine(index=0, schedule=Schedule(), result=MeasuredSchedule(0.0, True, 0)))


def test_a_divergence_above_the_bound_is_warned_of() -> None:
    lines: list[str] = []
    kl, agreement = (Measure(value=value, interval_95=(0.0, 1.0)) for value in (0.07, 1.0))
    for bound in (0.05, 0.08):
        _warn_above(
            bound,
            Fidelity(samples=3, kl=kl, agreement=agreement),
            StepProgress(warn=lines.append),
            what=" with --quantize int4",
            way_out="quantize fewer parts",
        )
    assert lines == [
        "the held-out KL with --quantize int4 is 0.07, above --max-kl 0.05; quantize fewer parts"
    ]
