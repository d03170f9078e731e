"""Prompts and arguments of ``Pipeline.generate`` and ``Pipeline.chat``, of every type; answers read in every order."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fuzz.subject import QUESTION, Outcome, Subject, judged
from tests.fuzz.values import NUMBERS, OTHERS, TEXTS, hostile
from trio_edge.runtime.bundle.errors import TrioEdgeError

if TYPE_CHECKING:
    import random

    from trio_edge.runtime.answer import Generation

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


class _Constraint:
    """Allows all tokens, until it fails in one way or another."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self._left, self._rng, self._size = rng.randrange(5), rng, size

    def allowed(self) -> Any:
        self._left -= 1
        if self._left < 0:
            return self._rng.choice((np.zeros(self._size, bool), np.ones(self._size, bool)))
        return np.ones(self._size, bool)

    def add(self, token: int) -> None:
        assert token >= 0


def stream(rng: random.Random, subject: Subject) -> Outcome:
    """One to three answers that are begun, read, cut, cancelled and asked again in any order.

    An answer that was whole stays so, and one that failed never looks whole afterwards.
    """
    return judged(lambda: _read_in_any_order(rng, subject))


def _read_in_any_order(rng: random.Random, subject: Subject) -> str:
    size = subject.manifest["dimensions"]["vocab_size"]
    answers = [_Reader(subject, _Constraint(rng, size) if rng.random() < 0.3 else None)]
    for _ in range(rng.randrange(1, 12)):
        action, reader = rng.randrange(8), rng.choice(answers)
        if action == 0 and len(answers) < 3:
            answers.append(_Reader(subject, None))
        elif action == 1:
            reader.answer.cancel()
        elif action == 2:
            in_thread = threading.Thread(target=reader.whole)
            in_thread.start()
            in_thread.join()
        elif action == 3:
            reader.whole()
        elif action == 4:
            _ = reader.answer.boxes
        else:
            reader.piece()
        reader.check()
    assert subject.answer_of(subject.pipeline) == subject.answer, "a later answer differs"
    return "ok"


class _Reader:
    """Reads one answer, and notes what it has said."""

    def __init__(self, subject: Subject, constraint: Any) -> None:
        self.answer: Generation = subject.pipeline.generate(
            subject.image, QUESTION, max_new_tokens=6, constraint=constraint
        )
        self._iterator = iter(self.answer)
        self._text: str | None = None
        self._error: str | None = None
        self._wrong: str | None = None

    def piece(self) -> None:
        self._noting(lambda: next(self._iterator, None))

    def whole(self) -> None:
        def read() -> None:
            text = self.answer.text
            if self._text not in (None, text):
                self._wrong = f"{self._text!r} became {text!r}"
            self._text = text

        self._noting(read)

    def _noting(self, action: Any) -> None:
        had_failed = self._error is not None
        try:
            action()
        except TrioEdgeError as error:
            self._error = str(error)
        except Exception as error:
            self._wrong = f"{type(error).__name__}: {error}"
        else:
            if had_failed and action.__name__ == "read":
                self._wrong = f"whole after {self._error!r}"

    def check(self) -> None:
        assert self._wrong is None, self._wrong
