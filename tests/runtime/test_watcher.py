"""The watcher: unchanged frames cost no model run, an answer changes only when it is clear and lasts, and an event tells all."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import export
from trio_edge.runtime import Pipeline, Question, ShapeError, Statistics, Watcher
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.decisions.question_file import read_questions
from trio_edge.runtime.decisions.questions import Decision
from trio_edge.runtime.decisions.watcher import THRESHOLD, difference, small_gray

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GATE = Question.choice("Is the gate open?", ["open", "closed", "unclear"], name="gate")
PICTURES = Path(__file__).parents[2] / "examples" / "pictures"
ASKED = [
    Question.yes_no("is there a star ?", name="star"),
    Question.choice("what color is the digit 3 ?", ["red", "green", "blue"], name="digit"),
]


STAGES = Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in ((1, 20), (5, 12), (8, 4))))


class Answers:
    """In place of a pipeline: gives the next probabilities at each run."""

    def __init__(self, *probabilities: Sequence[float]) -> None:
        self._next = itertools.cycle(probabilities)
        self.seen: list[Image.Image] = []

    def decide(self, image: Image.Image, questions: list[Question], level: None) -> list[Decision]:
        self.seen.append(image)
        return [Decision(question, tuple(next(self._next)), 0.9, Statistics()) for question in questions]


def frame(level: int) -> np.ndarray:
    return np.full((48, 64, 3), level, np.uint8)


def answers_of(letters: str) -> list[tuple[float, float, float]]:
    """Return probabilities: O and C are clear, o and c are not."""
    found = {"O": (0.9, 0.1, 0.0), "C": (0.1, 0.9, 0.0), "o": (0.5, 0.3, 0.2), "c": (0.3, 0.5, 0.2)}
    return [found[letter] for letter in letters]


@pytest.mark.parametrize(
    ("letters", "hold", "margin", "changes"),
    [
        ("OOCCOO", 1, 0.0, "o.c.o."),
        ("oOcCoO", 1, 0.0, "o.c.o."),
        ("oOcCoO", 1, 0.5, ".o.c.o"),
        ("OCOCOC", 2, 0.0, "......"),
        ("OOCOCC", 2, 0.0, ".o...c"),
        ("OOCCCC", 3, 0.0, "....c."),
        ("OOOCoCCC", 3, 0.5, "..o....c"),
        ("OOOCCcCCC", 3, 0.5, "..o.....c"),
        ("OOOCCcCCC", 3, 0.1, "..o..c..."),
        ("cccccc", 1, 0.5, "......"),
        ("cccCcc", 1, 0.8, "...c.."),
        ("OcOcO", 1, 0.8, "o...."),
    ],
)
def test_an_answer_changes_when_it_is_clear_and_lasts(
    letters: str, hold: int, margin: float, changes: str
) -> None:
    pipeline: Any = Answers(*answers_of(letters))
    watcher = Watcher(pipeline, [GATE], only_changes=True, hold=hold, margin=margin, threshold=0)
    found, before = "", None
    for _ in letters:
        events = watcher.see(frame(0))
        found += "".join(event.decision.choice[0] for event in events) or "."
        for event in events:
            assert event.previous == before
            before = event.decision.choice
    assert found == changes
    assert len(pipeline.seen) == len(letters)


@pytest.mark.parametrize("hold", [1, 2, 5])
def test_a_frame_that_looks_the_same_counts_for_hold_and_costs_no_run(hold: int) -> None:
    """Else a gate that opens and then stands still would never be told."""
    pipeline: Any = Answers(*answers_of("OC"))
    watcher = Watcher(pipeline, [GATE], only_changes=True, hold=hold)
    levels = [10] * 6 + [200] * 6
    told = [event.frame for level in levels for event in watcher.see(frame(level))]
    assert told == [hold - 1, 6 + hold - 1]
    assert len(pipeline.seen) == 2


def test_without_changes_there_is_an_event_for_each_run() -> None:
    pipeline: Any = Answers(*answers_of("OOOO"))
    watcher = Watcher(pipeline, [GATE])
    told = [event.frame for level in (10, 10, 200, 200, 10) for event in watcher.see(frame(level))]
    assert told == [0, 2, 4]


@pytest.mark.parametrize(
    ("threshold", "num_runs"), [(0, 20), (1, 20), (1.5, 10), (4, 5), (19, 2), (20, 1), (255, 1)]
)
def test_a_slow_change_is_not_missed(threshold: float, num_runs: int) -> None:
    """Each frame is one level brighter; it is compared with the last one that the model saw."""
    pipeline: Any = Answers(*answers_of("O"))
    watcher = Watcher(pipeline, [GATE], threshold=threshold)
    for level in range(100, 120):
        watcher.see(frame(level))
    assert len(pipeline.seen) == num_runs


def test_the_threshold_lies_between_noise_and_a_small_object() -> None:
    """benchmarks/frame_change.py measures more; docs/camera.md has its table."""
    rng = np.random.default_rng(0)
    scene = np.asarray(Image.open(PICTURES / "shapes-200x150.png").convert("RGB").resize((640, 480)), float)

    def seen(pixels: np.ndarray, sigma: float) -> Any:
        noisy = pixels + rng.normal(0, sigma, scene.shape)
        return small_gray(Image.fromarray(np.rint(noisy).clip(0, 255).astype(np.uint8)))

    changed = scene.copy()
    changed[200:255, 300:328] = 255 - changed[200:255, 300:328]  # half a percent
    still = max(difference(seen(scene, 15), seen(scene, 15)) for _ in range(10))
    assert still < 0.7 * THRESHOLD
    assert difference(seen(scene, 5), seen(changed, 5)) > 1.5 * THRESHOLD


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.from_bundle(export("tiny", dtype="float32", schedule=STAGES)) as opened:
        yield opened


@pytest.mark.parametrize("picture", sorted(PICTURES.glob("*.png")), ids=lambda path: path.stem)
def test_events_have_the_decisions_of_the_pipeline(pipeline: Pipeline, picture: Path) -> None:
    events = Watcher(pipeline, ASKED).see(picture, frame=7, at=1_000_000_000.25)
    for event, decision in zip(events, pipeline.decide(picture, ASKED), strict=True):
        line = json.loads(event.to_json(source="gate.mp4"))
        assert event.decision.probabilities == decision.probabilities
        assert line.pop("ms") > 0
        expected = {
            "time": "2001-09-09T01:46:40.250+00:00",
            "source": "gate.mp4",
            "frame": 7,
            "previous": None,
            **decision.to_dict(),
            "kept_tokens": [20, 12, 4],
        }
        expected.pop("ms")
        assert line == expected


def test_the_drawing_has_a_panel_for_each_stage(pipeline: Pipeline) -> None:
    watcher = Watcher(pipeline, ASKED)
    (event, _) = watcher.see(PICTURES / "shapes-96x96.png")
    assert watcher.drawing(event).width > 3 * 640


def test_an_unchanged_frame_shows_the_image_that_the_model_saw() -> None:
    pipeline: Any = Answers(*answers_of("O"))
    watcher = Watcher(pipeline, [GATE], only_changes=True, hold=2)
    watcher.see(frame(100))
    (event,) = watcher.see(frame(101))
    assert event.frame == 1
    assert event.image is pipeline.seen[0]


def test_a_score_has_its_mean_level() -> None:
    pipeline: Any = Answers((0.25, 0.25, 0.5))
    question = Question.score("How full is the bin?", ["empty", "half", "full"])
    (event,) = Watcher(pipeline, [question]).see(frame(0))
    line = json.loads(event.to_json(source="x"))
    assert (line["score"], line["answer"], line["question"]) == (1.25, "full", "How full is the bin?")
    assert line["name"] is None


def test_a_line_is_ascii_whatever_names_hold() -> None:
    question = Question.choice("?", ["T\u00fcr\n", "\u202eauf", "\udcff"], name="\x1b[31m")
    (event,) = Watcher(Answers((0.5, 0.3, 0.2)), [question]).see(frame(0))  # type: ignore[arg-type]
    line = event.to_json(source="/tmp/\udcff")
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["answer"] == "T\u00fcr\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hold": 0}, "^hold: expected a number of frames from 1, got 0;"),
        ({"hold": 1.5}, "^hold: expected a number of frames from 1, got 1.5;"),
        ({"hold": True}, "^hold: expected a number of frames from 1, got True;"),
        ({"margin": -0.1}, r"^margin: expected 0\.\.1, got -0.1;"),
        ({"margin": 1.1}, r"^margin: expected 0\.\.1, got 1.1;"),
        ({"margin": float("nan")}, r"^margin: expected 0\.\.1, got nan;"),
        ({"threshold": -1}, r"^threshold: expected 0\.\.255, got -1;"),
        ({"threshold": "2"}, r"^threshold: expected 0\.\.255, got '2';"),
        ({"threshold": float("inf")}, r"^threshold: expected 0\.\.255, got inf;"),
    ],
)
def test_an_impossible_setting_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        Watcher(Answers(), [GATE], **settings)  # type: ignore[arg-type]


def test_no_question_is_one_line() -> None:
    with pytest.raises(ShapeError, match=r"^questions: expected a list of 1..400 questions, got"):
        Watcher(Answers(), [])  # type: ignore[arg-type]


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_has_questions_of_three_kinds(tmp_path: Path) -> None:
    entries = [
        {"name": "person", "kind": "yes-no", "text": "Is there a person?"},
        {"name": "cat", "kind": "yes-no", "text": "Is there a cat?", "yes": "a cat", "no": "none"},
        {"name": "gate", "kind": "choice", "text": "Is it open?", "options": ["open", "closed"]},
        {"name": "light", "kind": "choice", "text": "Which?", "options": {"red": "stop", "green": "go"}},
        {"name": "full", "kind": "score", "text": "How full?", "levels": ["empty", "full"]},
        {"name": "wet", "kind": "score", "text": "How wet?", "levels": {"dry": "", "wet": "drops"}},
    ]
    assert read_questions(write(tmp_path / "questions.json", entries)) == [
        Question.yes_no("Is there a person?", name="person"),
        Question.yes_no("Is there a cat?", yes="a cat", no="none", name="cat"),
        Question.choice("Is it open?", ["open", "closed"], name="gate"),
        Question.choice("Which?", {"red": "stop", "green": "go"}, name="light"),
        Question.score("How full?", ["empty", "full"], name="full"),
        Question.score("How wet?", {"dry": "", "wet": "drops"}, name="wet"),
    ]


A_GATE = {"name": "gate", "kind": "choice", "text": "Is it open?", "options": ["open", "closed"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Input data was truncated"),
        ("{", "Input data was truncated"),
        ("hello", "invalid character"),
        ("[" * 100_000, "recursion|nest|truncated"),
        (b'["\xff"]', "UTF-8|utf-8"),
        ({}, r"Expected `array`, got `object`"),
        ([], r"1\.\.400 questions, got \[\]"),
        (["gate"], r"Expected `object`, got `str` - at `\$.questions\[0\]`"),
        ([A_GATE, A_GATE], "expected different names, got 'gate' twice"),
        ([{**A_GATE, "kind": "prose"}], r"Invalid value 'prose' - at `\$.questions\[0\].kind`"),
        ([{**A_GATE, "kind": "yes-no"}], "unknown field `options`"),
        ([{**A_GATE, "levels": ["a", "b"]}], "unknown field `levels`"),
        ([{"kind": "yes-no", "text": "?"}], "missing required field `name`"),
        ([{"name": "a", "text": "?"}], "missing required field `kind`"),
        ([{"name": "a", "kind": "yes-no"}], "missing required field `text`"),
        ([{"name": "", "kind": "yes-no", "text": "?"}], "length >= 1 - at `\\$.questions\\[0\\].name`"),
        ([{"name": "a\n", "kind": "yes-no", "text": "?"}], "matching regex"),
        ([{"name": "a", "kind": "yes-no", "text": " "}], "expected text, got none"),
        ([{**A_GATE, "options": ["open"]}], r"expected 2\.\.255 options, got 1"),
        ([{**A_GATE, "options": ["open", "open"]}], "expected different options, got 'open' twice"),
        ([{**A_GATE, "options": ["open", 3]}], "Expected `str`, got `int`"),
        ([{**A_GATE, "options": "open, closed"}], "got `str`"),
        (
            [{"name": "a", "kind": "score", "text": "?", "levels": list("abcdefghijk")}],
            r"2\.\.10 levels, got 11",
        ),
    ],
    ids=itertools.count(),
)
def test_a_broken_file_is_one_line_with_its_name(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    with pytest.raises(DataError, match=message) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}: expected a list of questions (")
    assert str(caught.value).endswith("); see docs/camera.md")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "null byte", "large"])
def test_what_is_no_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path: Any = tmp_path / "questions.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.write_bytes(b" " * ((1 << 20) + 1))
    path = {"device": "/dev/zero", "null byte": "a\0b"}.get(kind, path)
    with pytest.raises(DataError, match=r"expected a (readable file|list of questions)") as caught:
        read_questions(path)
    assert "\n" not in str(caught.value)
