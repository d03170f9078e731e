"""Reads a file of questions: a JSON list, whose entries have a "name", a "kind", a "text" and the answers.

[
  {"name": "person", "kind": "yes-no", "text": "Is there a person?"},
  {"name": "gate", "kind": "choice", "text": "Is the gate open?", "options": ["open", "closed", "unclear"]},
  {"name": "full", "kind": "score", "text": "How full is the bin?", "levels": ["empty", "half full", "full"]}
]

JSON and not TOML, which Python reads only from 3.11 on. "options" and "levels" may also be an object of descriptions by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import msgspec

from trio_edge.runtime.bundle.errors import DataError, ShapeError
from trio_edge.runtime.bundle.limits import Name, typed
from trio_edge.runtime.bundle.reader import read_regular
from trio_edge.runtime.decisions.questions import Question, check_questions

_MAX_BYTES = 1 << 20
_Options: TypeAlias = list[str] | dict[str, str]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    name: Name
    text: str


class _YesNo(_Entry, frozen=True, tag="yes-no"):
    yes: str = ""
    no: str = ""


class _Choice(_Entry, frozen=True, tag="choice"):
    options: _Options


class _Score(_Entry, frozen=True, tag="score"):
    levels: _Options


class _File(msgspec.Struct, frozen=True):
    questions: list[_YesNo | _Choice | _Score]


def read_questions(path: str | Path) -> list[Question]:
    """Return the questions in a JSON file, each with a name of its own.

    Raises:
        DataError: If it is missing, no regular file, no JSON, or an entry has an unknown key or an answer that cannot be told
            from another.
    """
    try:
        found = msgspec.json.decode(read_regular(Path(path), max_bytes=_MAX_BYTES))
        questions = [_question(entry) for entry in typed({"questions": found}, _File).questions]
        names = [question.name for question in questions]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ShapeError(f"expected different names, got {twice!r} twice")
        return check_questions(questions)
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, got: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also msgspec's, and a null byte in the path
        raise DataError(f"{path}: expected a list of questions ({error}); see docs/camera.md") from None


def _question(entry: _YesNo | _Choice | _Score) -> Question:
    if isinstance(entry, _YesNo):
        return Question.yes_no(entry.text, yes=entry.yes, no=entry.no, name=entry.name)
    if isinstance(entry, _Choice):
        return Question.choice(entry.text, entry.options, name=entry.name)
    return Question.score(entry.text, entry.levels, name=entry.name)
