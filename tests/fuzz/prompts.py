"""Prompts and arguments of ``Pipeline.generate`` and ``Pipeline.chat``, of every type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fuzz.subject import QUESTION, Outcome, Subject, judged
from tests.fuzz.values import NUMBERS, OTHERS, TEXTS, hostile

if TYPE_CHECKING:
    import random

_SETTINGS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "seed", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens",
    "override", "system", "history", "video", "fps", "num_frames", "source_fps",
)  # fmt: skip


def prompt(rng: random.Random, subject: Subject) -> Outcome:
    """One call with one to three odd arguments."""
    return judged(lambda: _chat(rng, subject) if rng.random() < 0.3 else _generate(rng, subject))


def _value(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(
            (
                b"bytes",
                [1],
                (),
                {"a": 1},
                object(),
                np.float32(0.5),
                np.int64(3),
                np.zeros(3),
                1j,
                range(3),
                "3",
            )
        )
    return rng.choice(NUMBERS) if kind < 4 else hostile(rng)


def _generate(rng: random.Random, subject: Subject) -> str:
    image, text = subject.image, QUESTION
    settings: dict[str, Any] = {"max_new_tokens": 2}
    for name in rng.sample(_SETTINGS, rng.choice((0, 1, 1, 2, 3))):
        settings[name] = _value(rng)
    if rng.random() < 0.3:
        text = rng.choice(
            (
                _value(rng),
                rng.choice(TEXTS),
                rng.choice(("word ", "é", "\0", "<image>", " ")) * rng.choice((1, 9, 9999)),
            )
        )
    if rng.random() < 0.2:
        image = rng.choice(
            (_value(rng), [subject.image] * 2, [None], rng.choice(TEXTS), None, [], [subject.image] * 300)
        )
    answer = subject.pipeline.generate(image, text, **settings)
    assert isinstance(answer.text, str)
    return "ok"


def _chat(rng: random.Random, subject: Subject) -> str:
    part = rng.choice((
        {"type": "text", "text": rng.choice((*TEXTS, None, 3))}, {"type": "image", "image": subject.image}, {"type": hostile(rng)},
        {"type": "video", "video": hostile(rng)}, {"type": "image", "image": hostile(rng)}, hostile(rng),
    ))  # fmt: skip
    content = rng.choice((QUESTION, [part], [part, {"type": "text", "text": "a"}], (part,), hostile(rng)))
    turn = rng.choice(
        (
            {"role": "user", "content": content},
            {"role": hostile(rng), "content": content},
            {"content": content},
        )
    )
    messages = rng.choice(
        ([turn], [turn, {"role": "user", "content": "b"}], (turn,), turn, rng.choice(OTHERS))
    )
    answer = subject.pipeline.chat(messages, max_new_tokens=2)
    assert isinstance(answer.text, str)
    return "ok"
