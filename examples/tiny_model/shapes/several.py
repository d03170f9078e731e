"""Questions about several images: a pair of images, or the frames of a short video.

``make_pair`` draws two independent scenes. ``make_video`` draws 4 to 6 frames: one or two objects move from frame to frame, two
others are in one frame only. ``ask_several`` asks about one image or frame, or about both images. ``held_out_several`` yields
samples as ``samples.held_out`` does, from seeds that training never uses. All words are in ``questions.VOCABULARY``, so that a
model trained on single images can read them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .questions import COUNT_WORDS, color_noun_of, group_of, matches, noun_of
from .samples import HELD_OUT_OFFSET, SEEDS_PER_STREAM, ShapeSample
from .scene import (
    CANVASES,
    COLOR_NAMES,
    SHAPES,
    Scene,
    Thing,
    make_scene,
    moved_thing,
    place_thing,
    render,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAIR_KINDS: tuple[str, ...] = ("two-which", "two-color", "two-both", "two-more")
VIDEO_KINDS: tuple[str, ...] = ("video-once", "video-when", "video-what", "video-where")
SEVERAL_KINDS: tuple[str, ...] = tuple(kind for pair in zip(PAIR_KINDS, VIDEO_KINDS) for kind in pair)
PAIR_CANVAS = CANVASES[0]
FRAME_CANVAS = next(canvas for canvas in CANVASES if (canvas.width, canvas.height) == (96, 48))
NUM_FRAMES = (4, 6)
_NUM_GUESTS = 2
_ASKED_TIMES = 8  # not every draw finds a question


@dataclass(frozen=True)
class Asked:
    """A question about several scenes, with its answer."""

    question: str
    answer: str
    key: str
    """The noun phrase asked about."""
    images: tuple[int, ...]
    """Indices of the images that the question is about."""
    answer_image: int | None = None
    """Index of the image that has the answer, if only one has it."""


def make_pair(seed: int) -> tuple[Scene, ...]:
    """Return the two scenes of a seed, of one size."""
    return tuple(make_scene(2 * seed + number, canvas=PAIR_CANVAS) for number in range(2))


def make_video(seed: int) -> tuple[Scene, ...]:
    """Return the frames of a seed: one background, 1 or 2 objects that move, 2 that are in one frame only."""
    rng = random.Random(f"video {seed}")
    num_frames = rng.randint(*NUM_FRAMES)
    num_staying = rng.randint(1, 2)
    looks: list[Thing] = []
    while len(looks) < num_staying + _NUM_GUESTS:
        look = place_thing(rng, FRAME_CANVAS, [], palette=list(COLOR_NAMES), names=list(SHAPES))
        if look is not None and all(color_noun_of(look) != color_noun_of(other) for other in looks):
            looks.append(look)
    staying, guests = looks[:num_staying], looks[num_staying:]
    visits = dict(zip(rng.sample(range(num_frames), _NUM_GUESTS), guests))
    frames = []
    for frame in range(num_frames):
        things: list[Thing] = []
        for look in [visits[frame], *staying] if frame in visits else staying:  # the guest has first choice
            thing = moved_thing(look, FRAME_CANVAS, things, rng)
            if thing is not None:
                things.append(thing)
        frames.append(Scene(seed, FRAME_CANVAS, tuple(things)))
    return tuple(frames)


def scenes_of(seed: int, kind: str) -> tuple[Scene, ...]:
    """Return the scenes of a seed for a kind of question."""
    return make_pair(seed) if kind in PAIR_KINDS else make_video(seed)


def ask_several(scenes: tuple[Scene, ...], kind: str, rng: random.Random) -> Asked | None:
    """Return one question of a kind with its answer, or None when the scenes allow none."""
    return _ASKERS[kind](tuple(scene.things for scene in scenes), rng)


def held_out_several(count: int, *, seed: int = 0) -> Iterator[ShapeSample]:
    """Yield ``count`` samples with one question per set of images; each kind occurs equally often, give or take one."""
    given, scene_seed = 0, HELD_OUT_OFFSET + seed * SEEDS_PER_STREAM
    while given < count:
        sample = sample_of(scene_seed, SEVERAL_KINDS[given % len(SEVERAL_KINDS)])
        scene_seed += 1
        if sample is not None:
            given += 1
            yield sample


def sample_of(seed: int, kind: str) -> ShapeSample | None:
    """Return the sample of a seed, or None when its scenes allow no question of that kind."""
    scenes, rng = scenes_of(seed, kind), random.Random(f"held out {seed}")
    drawn = (ask_several(scenes, kind, rng) for _ in range(_ASKED_TIMES))
    asked = next((found for found in drawn if found), None)
    if asked is None:
        return None
    return ShapeSample(
        images=tuple(render(scene) for scene in scenes),
        question=asked.question,
        answer=asked.answer,
        kind=kind,
        sample_id=f"{seed}-{kind}",
        answer_image=asked.answer_image,
    )


_Images = tuple[tuple[Thing, ...], ...]


def _name(index: int) -> str:
    """Return ``image two``."""
    return f"image {COUNT_WORDS[index + 1]}"


def _with(images: _Images, key: str) -> list[int]:
    """Return the indices of the images with an object that a noun phrase describes."""
    return [index for index, things in enumerate(images) if matches(things, key)]


def _ask_which(images: _Images, rng: random.Random) -> Asked | None:
    """Ask which image or frame an object is in; it is in one only."""
    every = tuple(range(len(images)))
    keys = [(color_noun_of(thing), index) for index in every for thing in images[index]]
    found = [(key, index) for key, index in keys if _with(images, key) == [index]]
    if not found:
        return None
    key, index = rng.choice(found)
    return Asked(f"which image is the {key} in ?", COUNT_WORDS[index + 1], key, every, index)


def _ask_color_in_one(images: _Images, rng: random.Random) -> Asked | None:
    """Ask for the colour of an object in one image; the other image has the shape in another colour."""
    keys = {noun_of(thing) for things in images for thing in things}
    once = sorted(key for key in keys if all(matches(things, key) == 1 for things in images))
    colors = {
        key: [thing.color for things in images for thing in things if noun_of(thing) == key] for key in once
    }
    found = [key for key in once if len(set(colors[key])) == len(images)]
    if not found:
        return None
    key, index = rng.choice(found), rng.randrange(len(images))
    question = f"what color is the {key} in {_name(index)} ?"
    return Asked(question, colors[key][index], key, (index,), index)


def _ask_both(images: _Images, rng: random.Random) -> Asked | None:
    """Ask whether both images have an object; at least one has it, and both answers are possible."""
    phrases: list[Callable[[Thing], str]] = [color_noun_of, noun_of, lambda thing: f"{thing.color} object"]
    rng.shuffle(phrases)
    for phrase in phrases:
        keys = sorted({phrase(thing) for things in images for thing in things})
        found = {
            "yes": [key for key in keys if len(_with(images, key)) == len(images)],
            "no": [key for key in keys if len(_with(images, key)) == 1],
        }
        if all(found.values()):
            answer = rng.choice(("yes", "no"))
            key = rng.choice(found[answer])
            question = f"is there a {key} in {_name(0)} and in {_name(1)} ?"
            return Asked(question, answer, key, tuple(range(len(images))))
    return None


def _ask_more(images: _Images, rng: random.Random) -> Asked | None:
    """Ask whether the first image has more objects of a group than the second."""
    answer = rng.choice(("yes", "no"))
    for _ in range(12):
        key = group_of(images[0] + images[1], rng)
        first, second = (matches(things, key) for things in images)
        if first != second and (first > second) == (answer == "yes"):
            return Asked(f"are there more {key} in {_name(0)} than {_name(1)} ?", answer, key, (0, 1))
    return None


def _ask_once(images: _Images, rng: random.Random) -> Asked | None:
    """Ask whether an object exists: it is in one frame, or only its colour and its shape occur."""
    every = tuple(range(len(images)))
    things = [thing for frame in images for thing in frame]
    if rng.random() < 0.5:
        keys = sorted({color_noun_of(thing) for thing in things})
        found = [key for key in keys if len(_with(images, key)) == 1]
        answer = "yes"
    else:
        mixed = {f"{one.color} {color_noun_of(other).split()[1]}" for one in things for other in things}
        found = [key for key in sorted(mixed) if not _with(images, key)]
        answer = "no"
    if not found:
        return None
    key = rng.choice(found)
    return Asked(
        f"is there a {key} ?", answer, key, every, _with(images, key)[0] if answer == "yes" else None
    )


def _ask_what(images: _Images, rng: random.Random) -> Asked | None:
    """Ask for the colour of an object that is in one frame only."""
    keys = [(noun_of(thing), thing.color, index) for index, things in enumerate(images) for thing in things]
    found = [one for one in keys if sum(matches(things, one[0]) for things in images) == 1]
    if not found:
        return None
    key, color, index = rng.choice(found)
    return Asked(f"what color is the {key} ?", color, key, tuple(range(len(images))), index)


def _ask_where(images: _Images, rng: random.Random) -> Asked | None:
    """Ask where an object that moves is in one frame."""
    index = rng.randrange(len(images))
    found = [thing for thing in images[index] if len(_with(images, color_noun_of(thing))) > 1]
    if not found:
        return None
    thing = rng.choice(found)
    key = color_noun_of(thing)
    return Asked(f"where is the {key} in {_name(index)} ?", thing.place, key, (index,), index)


_ASKERS: dict[str, Callable[[_Images, random.Random], Asked | None]] = {
    "two-which": _ask_which,
    "two-color": _ask_color_in_one,
    "two-both": _ask_both,
    "two-more": _ask_more,
    "video-once": _ask_once,
    "video-when": _ask_which,
    "video-what": _ask_what,
    "video-where": _ask_where,
}
