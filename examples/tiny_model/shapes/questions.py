"""Questions about a scene: ``ask`` draws one unambiguous question of a kind, with its one-word answer.

Every reference ("the small red star") names exactly one object. ``VOCABULARY`` has all words of questions and answers.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .scene import COLOR_NAMES, DIGITS, PLACES, SHAPES, SIZES, Scene, Thing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

KINDS: tuple[str, ...] = ("color", "shape", "digit", "place", "count", "comparison", "existence")
PLURALS: dict[str, str] = {shape: f"{shape}es" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COUNT_WORDS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven")
_QUESTION_WORDS = (
    "what", "which", "where", "how", "many", "is", "are", "there", "the", "a", "in", "of", "color", "shape", "digit",
    "digits", "object", "objects", "larger", "more", "than", "or", "and", "?", ".", ",", "look", "at", "this", "picture",
    "please", "answer", "question", "you", "see", "image", "short", "with", "one-word", "to", "it", "can", "do",
)  # fmt: skip
_WORDS = ("yes", "no", *COLOR_NAMES, *SHAPES, *PLURALS.values(), *DIGITS, *SIZES, *PLACES, *COUNT_WORDS)
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys((*_WORDS, *_QUESTION_WORDS)))


def ask(scene: Scene, kind: str, rng: random.Random) -> tuple[str, str] | None:
    """Return one question of a kind and its answer, or None when the scene allows none."""
    return _ASKERS[kind](scene.things, rng)


def _unique(items: list[tuple[str, Thing]]) -> list[tuple[str, Thing]]:
    """Return the (key, thing) pairs whose key occurs once."""
    seen = Counter(key for key, _ in items)
    return [(key, thing) for key, thing in items if seen[key] == 1]


def _about_one(
    found: list[tuple[str, Thing]], rng: random.Random, question: str, answer: str
) -> tuple[str, str] | None:
    """Ask for the attribute ``answer`` of one of the named things, drawn; None if there is none."""
    if not found:
        return None
    key, thing = rng.choice(found)
    return question.format(key), getattr(thing, answer)


def noun_of(thing: Thing) -> str:
    """Return ``digit 7`` or ``star``."""
    return f"digit {thing.name}" if thing.is_digit else thing.name


def color_noun_of(thing: Thing) -> str:
    """Return ``red digit`` or ``red star``."""
    return f"{thing.color} {'digit' if thing.is_digit else thing.name}"


def _ask_color(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask for the colour of an object named by shape, by size and shape, or by place."""
    way = rng.random()
    if way < 0.55:
        found = _unique([(noun_of(t), t) for t in things])
    elif way < 0.75:
        found = _unique([(f"{t.size} {t.name}", t) for t in things if not t.is_digit])
    else:
        found = _unique([(f"object in the {t.place}", t) for t in things])
    return _about_one(found, rng, "what color is the {} ?", "color")


def _ask_shape(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask for the shape of an object named by colour, by size and colour, or by place."""
    way = rng.random()
    if way < 0.55:
        found = _unique([(f"{t.color} object", t) for t in things])
    elif way < 0.75:
        found = _unique([(f"{t.size} {t.color} object", t) for t in things])
    else:
        found = _unique([(f"object in the {t.place}", t) for t in things])
    found = [(key, thing) for key, thing in found if not thing.is_digit]
    return _about_one(found, rng, "what shape is the {} ?", "name")


def _ask_digit(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask which digit has a colour, a size or a place."""
    way = rng.random()
    digits = [t for t in things if t.is_digit]
    if way < 0.6:
        found = _unique([(t.color, t) for t in digits])
    elif way < 0.8:
        found = _unique([(t.size, t) for t in digits])
    else:
        found = _unique([(f"in the {t.place}", t) for t in digits])
    return _about_one(found, rng, "which digit is {} ?", "name")


def _ask_place(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask where an object is."""
    found = _unique([((color_noun_of if rng.random() < 0.6 else noun_of)(t), t) for t in things])
    found = [(key, thing) for key, thing in found if matches(things, key) == 1]
    return _about_one(found, rng, "where is the {} ?", "place")


def matches(things: tuple[Thing, ...], key: str) -> int:
    """Count the objects that a noun phrase describes."""
    return sum(all(_word_fits(thing, word) for word in key.split()) for thing in things)


def _word_fits(thing: Thing, word: str) -> bool:
    """Return whether one word is true of an object."""
    if word in ("object", "objects"):
        return True
    if word in ("digit", "digits"):
        return thing.is_digit
    return word in (thing.name, thing.color, thing.size, PLURALS.get(thing.name))


def group_of(things: tuple[Thing, ...], rng: random.Random) -> str:
    """Return a plural phrase, half of the time about something that is there."""
    thing = rng.choice(things) if rng.random() < 0.75 else None
    way = rng.random()
    if way < 0.5:
        return f"{thing.color if thing else rng.choice(COLOR_NAMES)} objects"
    if way < 0.65:
        return f"{rng.choice(SIZES)} objects"
    if way < 0.78:
        return "digits"
    name = thing.name if thing and not thing.is_digit else rng.choice(SHAPES)
    return PLURALS[name]


def _ask_count(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask for a number of objects from zero to five, larger numbers preferred a little."""
    if not things:
        return None
    drawn = [(matches(things, group), group) for group in (group_of(things, rng) for _ in range(2))]
    number, group = max(drawn) if rng.random() < 0.6 else drawn[0]
    if number > 5:
        return None
    return f"how many {group} are there ?", COUNT_WORDS[number]


def _ask_comparison(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask which of two groups is more numerous, or whether one object is larger than another."""
    answer = rng.choice(("yes", "no"))
    if rng.random() < 0.4:
        return _ask_larger(things, rng, answer)
    for _ in range(12):
        first, second = group_of(things, rng), group_of(things, rng)
        if first.split()[-1] != second.split()[-1] and "objects" in first + second:
            continue
        more, fewer = matches(things, first), matches(things, second)
        if more != fewer and (more > fewer) == (answer == "yes"):
            return f"are there more {first} than {second} ?", answer
    return None


def _ask_larger(things: tuple[Thing, ...], rng: random.Random, answer: str) -> tuple[str, str] | None:
    """Ask whether one object is larger than another of the other size."""
    found = _unique([(color_noun_of(t), t) for t in things])
    large = [key for key, thing in found if thing.size == "large"]
    small = [key for key, thing in found if thing.size == "small"]
    if not large or not small:
        return None
    pair = [rng.choice(large), rng.choice(small)]
    first, second = pair if answer == "yes" else reversed(pair)
    return f"is the {first} larger than the {second} ?", answer


def _ask_existence(things: tuple[Thing, ...], rng: random.Random) -> tuple[str, str] | None:
    """Ask whether an object exists; both answers are equally likely, and most absent ones nearly exist."""
    if not things:
        return None
    answer = rng.choice(("yes", "no"))
    for _ in range(12):
        one, other = rng.choice(things), rng.choice(things)
        color = other.color if rng.random() < 0.6 else rng.choice(COLOR_NAMES)
        if rng.random() < 0.3:
            key = f"digit {one.name if one.is_digit and answer == 'yes' else rng.choice(DIGITS)}"
        elif answer == "yes":
            key = color_noun_of(one)
        else:
            noun = rng.choice((*SHAPES, "digit")) if rng.random() < 0.4 else color_noun_of(one).split()[1]
            key = f"{color} {noun}"
        if (matches(things, key) > 0) == (answer == "yes"):
            return f"is there a {key} ?", answer
    return None


_ASKERS: dict[str, Callable[[tuple[Thing, ...], random.Random], tuple[str, str] | None]] = {
    "color": _ask_color,
    "shape": _ask_shape,
    "digit": _ask_digit,
    "place": _ask_place,
    "count": _ask_count,
    "comparison": _ask_comparison,
    "existence": _ask_existence,
}
