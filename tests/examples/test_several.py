"""Questions about several images: deterministic, disjoint from training, balanced, and every answer certain."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from examples.tiny_model.shapes.questions import COUNT_WORDS, VOCABULARY, matches
from examples.tiny_model.shapes.samples import HELD_OUT_OFFSET
from examples.tiny_model.shapes.scene import PLACES, render
from examples.tiny_model.shapes.several import (
    NUM_FRAMES,
    PAIR_KINDS,
    SEVERAL_KINDS,
    VIDEO_KINDS,
    Asked,
    Scene,
    ask_several,
    held_out_several,
    make_video,
    scenes_of,
)

ONE_IMAGE = ("two-which", "two-color", "video-when", "video-what", "video-where")


def _asked(kind: str) -> list[tuple[tuple[Scene, ...], Asked]]:
    pairs = [(scenes_of(seed, kind), random.Random(seed)) for seed in range(200)]
    asked = [(scenes, ask_several(scenes, kind, rng)) for scenes, rng in pairs]
    return [(scenes, one) for scenes, one in asked if one is not None]


def _counts(scenes: tuple[Scene, ...], key: str) -> list[int]:
    return [matches(scene.things, key) for scene in scenes]


def test_same_seed_gives_the_same_bytes_and_a_longer_stream_starts_with_the_shorter_one() -> None:
    first, again = (list(held_out_several(count, seed=3)) for count in (8, 16))
    assert [(s.sample_id, s.question, s.answer) for s in again[:8]] == [
        (s.sample_id, s.question, s.answer) for s in first
    ]
    assert [image.tobytes() for s in first for image in s.images] == [
        image.tobytes() for s in again[:8] for image in s.images
    ]


def test_held_out_seeds_lie_beyond_the_training_seeds_and_streams_share_none() -> None:
    one, other = ({int(s.sample_id.split("-")[0]) for s in held_out_several(16, seed=n)} for n in (0, 1))
    assert min(one | other) >= HELD_OUT_OFFSET
    assert not one & other


def test_kinds_are_equally_frequent_and_words_are_known() -> None:
    samples = list(held_out_several(80))
    assert Counter(sample.kind for sample in samples) == dict.fromkeys(SEVERAL_KINDS, 10)
    for sample in samples:
        assert {*sample.question.split(), sample.answer} <= set(VOCABULARY)
        wanted = (2, 2) if sample.kind in PAIR_KINDS else NUM_FRAMES
        assert wanted[0] <= len(sample.images) <= wanted[1]


def test_a_video_has_two_objects_in_one_frame_only_and_others_that_move() -> None:
    for frames in map(make_video, range(60)):
        frames_of = Counter((t.color, t.name) for frame in frames for t in frame.things)
        assert sum(count == 1 for count in frames_of.values()) >= 2
        assert max(frames_of.values()) > 1
        assert all(frame.things for frame in frames)
        sizes = {render(frame).size for frame in frames}
        assert len(sizes) == 1


@pytest.mark.parametrize("kind", ["two-both", "two-more", "video-once"])
def test_yes_and_no_are_about_equally_frequent(kind: str) -> None:
    answers = Counter(asked.answer for _, asked in _asked(kind))
    assert set(answers) == {"yes", "no"}
    assert 0.4 < answers["yes"] / answers.total() < 0.6


@pytest.mark.parametrize("kind", ["two-which", "video-when"])
def test_the_object_is_in_the_named_image_only(kind: str) -> None:
    for scenes, asked in _asked(kind):
        holding = [index for index, count in enumerate(_counts(scenes, asked.key)) if count]
        assert holding == [COUNT_WORDS.index(asked.answer) - 1] == [asked.answer_image]


def test_the_other_image_gives_another_color() -> None:
    for scenes, asked in _asked("two-color"):
        colors = [[t.color for t in scene.things if matches((t,), asked.key)] for scene in scenes]
        assert asked.answer_image is not None
        assert colors[asked.answer_image] == [asked.answer]
        assert colors[1 - asked.answer_image] != [asked.answer]
        assert f"in image {COUNT_WORDS[asked.answer_image + 1]} ?" in asked.question


def test_both_needs_both_images() -> None:
    for scenes, asked in _asked("two-both"):
        holding = sum(count > 0 for count in _counts(scenes, asked.key))
        assert holding == (2 if asked.answer == "yes" else 1)


def test_more_compares_the_first_with_the_second() -> None:
    for scenes, asked in _asked("two-more"):
        first, second = _counts(scenes, asked.key)
        assert first != second
        assert (first > second) == (asked.answer == "yes")


def test_what_is_there_is_in_one_frame_and_what_is_not_is_nowhere() -> None:
    for scenes, asked in _asked("video-once"):
        holding = [index for index, count in enumerate(_counts(scenes, asked.key)) if count]
        assert holding == ([] if asked.answer_image is None else [asked.answer_image])
        assert (asked.answer == "yes") == (asked.answer_image is not None)


def test_the_color_is_of_an_object_of_one_frame() -> None:
    for scenes, asked in _asked("video-what"):
        (thing,) = (t for scene in scenes for t in scene.things if matches((t,), asked.key))
        assert thing.color == asked.answer


def test_the_place_is_that_in_the_named_frame() -> None:
    for scenes, asked in _asked("video-where"):
        assert asked.answer_image is not None
        (thing,) = (t for t in scenes[asked.answer_image].things if matches((t,), asked.key))
        assert thing.place == asked.answer
        assert asked.answer in PLACES


def test_every_kind_that_asks_about_one_image_says_which() -> None:
    assert set(ONE_IMAGE) < {*PAIR_KINDS, *VIDEO_KINDS}
    for sample in held_out_several(40):
        if sample.kind in ONE_IMAGE:
            assert sample.answer_image is not None
