"""The demo images and questions: deterministic, disjoint from training, and every answer certain."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from examples.tiny_model.shapes.questions import COUNT_WORDS, KINDS, PLURALS, VOCABULARY, ask
from examples.tiny_model.shapes.samples import HELD_OUT_OFFSET, held_out
from examples.tiny_model.shapes.scene import CANVASES, SIZES, Scene, Thing, make_scene, render
from examples.tiny_model.shapes.several import held_out_several
from tests.calibration.question_files import drawn_questions
from trio_edge.calibration.questions import read_questions

if TYPE_CHECKING:
    from pathlib import Path

SCENES = [make_scene(seed) for seed in range(300)]


def _fits(thing: Thing, words: list[str]) -> bool:
    facts = {thing.name, thing.color, thing.size, "object", "objects"}
    facts |= {"digit", "digits"} if thing.is_digit else {PLURALS[thing.name]}
    return all(word in facts for word in words)


def _asked(kind: str) -> list[tuple[Scene, list[str], str]]:
    pairs = [(scene, ask(scene, kind, random.Random(scene.seed))) for scene in SCENES]
    return [(scene, pair[0].split(), pair[1]) for scene, pair in pairs if pair]


def test_same_seed_gives_the_same_bytes() -> None:
    first = [(s.images[0].tobytes(), s.question, s.answer) for s in held_out(40, seed=3)]
    assert first == [(s.images[0].tobytes(), s.question, s.answer) for s in held_out(40, seed=3)]


def test_a_longer_stream_starts_with_the_shorter_one() -> None:
    short, long = ([s.sample_id for s in held_out(count)] for count in (11, 40))
    assert long[:11] == short


def test_held_out_seeds_lie_beyond_the_training_seeds() -> None:
    assert min(int(s.sample_id.split("-")[0]) for s in held_out(50)) >= HELD_OUT_OFFSET > 500_000_000


def test_two_streams_share_no_image() -> None:
    one, other = ({s.sample_id.split("-")[0] for s in held_out(50, seed=seed)} for seed in (0, 1))
    assert not one & other


def test_kinds_are_equally_frequent() -> None:
    counts = Counter(s.kind for s in held_out(70))
    assert counts == dict.fromkeys(KINDS, 10)


def test_every_word_is_in_the_vocabulary() -> None:
    for sample in held_out(350):
        assert {*sample.question.split(), sample.answer} <= set(VOCABULARY)


def test_all_image_sizes_occur() -> None:
    assert {(s.canvas.width, s.canvas.height) for s in SCENES} == {(c.width, c.height) for c in CANVASES}


def test_render_has_the_size_of_the_canvas() -> None:
    for canvas in CANVASES:
        assert render(make_scene(1, canvas=canvas)).size == (canvas.width, canvas.height)


@pytest.mark.parametrize("scene", SCENES[:60], ids=lambda s: str(s.seed))
def test_objects_keep_clear_of_tile_borders_and_of_each_other(scene: Scene) -> None:
    for index, one in enumerate(scene.things):
        assert all(abs(one.x - cut) >= one.half_width for cut in scene.canvas.cuts_x)
        assert all(abs(one.y - cut) >= one.half_height for cut in scene.canvas.cuts_y)
        for other in scene.things[index + 1 :]:
            apart_x = abs(one.x - other.x) > one.half_width + other.half_width
            assert apart_x or abs(one.y - other.y) > one.half_height + other.half_height


def test_counts_are_right() -> None:
    for scene, words, answer in _asked("count"):
        assert COUNT_WORDS[sum(_fits(t, words[2:-3]) for t in scene.things)] == answer


def test_existence_is_right() -> None:
    for scene, words, answer in _asked("existence"):
        assert any(_fits(t, words[3:-1]) for t in scene.things) == (answer == "yes")


def test_place_questions_name_exactly_one_object() -> None:
    for scene, words, answer in _asked("place"):
        assert [t.place for t in scene.things if _fits(t, words[3:-1])] == [answer]


@pytest.mark.parametrize(("kind", "answer_of"), [("color", "color"), ("shape", "name")])
def test_attribute_questions_name_exactly_one_object(kind: str, answer_of: str) -> None:
    for scene, words, answer in _asked(kind):
        noun = words[4:-1]
        named = (
            [t for t in scene.things if t.place == noun[-1]]
            if "in" in noun
            else [t for t in scene.things if _fits(t, noun)]
        )
        assert [getattr(t, answer_of) for t in named] == [answer]


def test_digit_questions_name_exactly_one_digit() -> None:
    for scene, words, answer in _asked("digit"):
        key = words[-2]
        named = [t for t in scene.things if t.is_digit and key in (t.color, t.size, t.place)]
        assert [t.name for t in named] == [answer]


def test_comparisons_are_right() -> None:
    for scene, words, answer in _asked("comparison"):
        middle = words.index("than")
        if words[2] == "more":
            first, second = words[3:middle], words[middle + 1 : -1]
            counts = [sum(_fits(t, group) for t in scene.things) for group in (first, second)]
            assert counts[0] != counts[1]
            assert (counts[0] > counts[1]) == (answer == "yes")
        else:
            groups = (words[2 : words.index("larger")], words[middle + 2 : -1])
            sizes = [[SIZES.index(t.size) for t in scene.things if _fits(t, group)] for group in groups]
            assert sorted(sizes) == [[0], [1]]
            assert (sizes[0] > sizes[1]) == (answer == "yes")


def test_written_questions_are_what_trio_eval_reads(tmp_path: Path) -> None:
    questions = read_questions(drawn_questions(tmp_path / "one", "--count", "8", "--seed", "3"))
    samples = list(held_out(8, seed=3))
    assert [(q.sample_id, q.kind, q.question, q.answers) for q in questions] == [
        (s.sample_id, s.kind, s.question, (s.answer,)) for s in samples
    ]
    for question, sample in zip(questions, samples):
        with Image.open(question.images[0]) as image:
            assert image.tobytes() == sample.images[0].tobytes()
    ids = {question.image_id: question.sample_id.split("-")[0] for question in questions}
    assert len(set(ids.values())) == len(ids) < 8


def test_written_questions_about_several_images_name_them_in_order(tmp_path: Path) -> None:
    questions = read_questions(drawn_questions(tmp_path, "--count", "8", "--several"))
    assert [len(question.images) > 1 for question in questions] == [True] * 8
    for question, sample in zip(questions, held_out_several(8)):
        for path, expected in zip(question.images, sample.images, strict=True):
            with Image.open(path) as image:
                assert image.tobytes() == expected.tobytes()
