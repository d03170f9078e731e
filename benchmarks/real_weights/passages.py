"""Passages of facts about people, in real words, each with a question whose answer stands in it."""

from __future__ import annotations

import random
from typing import NamedTuple

_NAMES = (
    "Anna", "Tom", "Maria", "John", "Lisa", "Peter", "Sarah", "David", "Emma", "Mark", "Laura", "Paul", "Julia", "Alex",
    "Nina", "Simon", "Clara", "Eric", "Helen", "Oscar",
)  # fmt: skip
_FACTS = (
    ("{0}'s favorite color is", "What is {0}'s favorite color?",
     ("red", "blue", "green", "yellow", "purple", "orange", "black", "white", "pink", "brown")),
    ("{0} lives in", "Where does {0} live?",
     ("Paris", "London", "Berlin", "Rome", "Madrid", "Tokyo", "Chicago", "Boston", "Dublin", "Moscow")),
    ("{0} works as a", "What is {0}'s job?",
     ("teacher", "doctor", "nurse", "farmer", "baker", "lawyer", "pilot", "writer", "singer", "driver")),
    ("{0} owns a", "Which animal does {0} own?",
     ("dog", "cat", "horse", "rabbit", "bird", "fish", "snake", "cow", "goat", "pig")),
    ("{0} likes to eat", "What does {0} like to eat?",
     ("bread", "cheese", "fish", "rice", "soup", "cake", "fruit", "chicken", "pizza", "pasta")),
)  # fmt: skip
_FILLERS = (
    "The weather was mild and the streets were quiet.",
    "A small river runs behind the old houses.",
    "Most shops close early on Sunday afternoon.",
    "The train from the north arrives at noon.",
    "Many people walk through the park in spring.",
    "A new library opened near the station last year.",
)
NUM_KINDS = 3


class Passage(NamedTuple):
    """A passage and what is asked about it."""

    text: str
    fact: str
    """The sentence of ``text`` with the answer."""
    question: str
    beginning: str
    """The answer up to the word."""
    word: str
    """With the space before it."""


def passages(count: int, *, seed: int) -> list[Passage]:
    """Return ``count`` passages: ``NUM_KINDS`` kinds of facts, each about two people, and two sentences about nothing."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        names = draw.sample(_NAMES, 2 * NUM_KINDS)
        kinds = 2 * draw.sample(_FACTS, NUM_KINDS)
        told = [
            (begin.format(name), question.format(name), draw.choice(words))
            for name, (begin, question, words) in zip(names, kinds)
        ]
        sentences = [f"{begin} {word}." for begin, _, word in told] + draw.sample(_FILLERS, 2)
        draw.shuffle(sentences)
        begin, question, word = draw.choice(told)
        found.append(Passage(" ".join(sentences), f"{begin} {word}.", question, begin, f" {word}"))
    return found
