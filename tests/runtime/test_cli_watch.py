"""trio-watch: a line for each decision or change, events saved and sent, one line for what is wrong, and a clean end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from tests.bundles import export
from tests.camera_server import jpeg_part, serving
from tests.runtime.test_watcher import PICTURES, STAGES
from trio_edge.runtime import Pipeline, Question
from trio_edge.runtime.cli import watch
from trio_edge.runtime.cli.watch import main
from trio_edge.runtime.decisions.question_file import read_questions
from trio_edge.runtime.videos import live

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENTRIES = [
    {"name": "star", "kind": "yes-no", "text": "is there a star ?"},
    {
        "name": "digit",
        "kind": "choice",
        "text": "what color is the digit 3 ?",
        "options": ["red", "green", "blue"],
    },
]
NAMES = ["shapes-96x96.png", "shapes-200x150.png"]
ORDER = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
"""Which of the two each frame of a source is."""
COMMAND = "import sys; from trio_edge.runtime.cli.watch import main; sys.exit(main())"


@pytest.fixture(scope="module")
def bundle() -> Path:
    return export("tiny", dtype="float32", schedule=STAGES)


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(autouse=True)
def _opened_once(bundle: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process share a pipeline; those in processes of their own open the bundle."""
    from_bundle = Pipeline.from_bundle

    def opened(folder: Path, **loading: Any) -> Any:
        is_shared = str(folder) == str(bundle) and loading.get("backend") in (None, "auto")
        return contextlib.nullcontext(pipeline) if is_shared else from_bundle(folder, **loading)

    monkeypatch.setattr(Pipeline, "from_bundle", opened)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(ENTRIES))
    return path


def scenes() -> list[Image.Image]:
    return [Image.open(PICTURES / name).convert("RGB").resize((192, 144)) for name in NAMES]


def write_folder(folder: Path) -> Path:
    folder.mkdir()
    for number, index in enumerate(ORDER):
        scenes()[index].save(folder / f"{number}.png")
    return folder


def write_clip(path: Path) -> Path:
    import av

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 192, 144, "yuv420p", 4_000_000
        for index in ORDER:
            container.mux(stream.encode(av.VideoFrame.from_image(scenes()[index])))
        container.mux(stream.encode())
    return path


SOURCES = {
    "folder": lambda tmp: write_folder(tmp / "frames"),
    "mp4": lambda tmp: write_clip(tmp / "clip.mp4"),
    "mkv": lambda tmp: write_clip(tmp / "clip.mkv"),
}


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.fixture(scope="module")
def answers(pipeline: Pipeline) -> list[list[str]]:
    """For each of the two scenes, the answers to the questions."""
    asked = [
        Question.yes_no(str(ENTRIES[0]["text"])),
        Question.choice(str(ENTRIES[1]["text"]), list(ENTRIES[1]["options"])),
    ]
    return [[one.choice for one in pipeline.decide(scene, asked)] for scene in scenes()]


SETTINGS = [*itertools.product([False, True], [None, 0], [1, 2])]


@pytest.mark.parametrize(
    ("kind", "only_changes", "threshold", "hold"),
    [
        *(("folder", *settings) for settings in SETTINGS),
        # A container gives frames; tests of the watcher have what becomes of them.
        *((kind, *settings) for kind in ("mp4", "mkv") for settings in (SETTINGS[0], SETTINGS[-1])),
    ],
)
def test_lines_are_those_of_the_frames_that_changed(
    kind: str,
    only_changes: bool,
    threshold: int | None,
    hold: int,
    bundle: Path,
    questions: Path,
    answers: list[list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = SOURCES[kind](tmp_path)
    arguments = [str(source), "--bundle", str(bundle), "--questions", str(questions), "--hold", str(hold)]
    arguments += ["--changes"] * only_changes + ([] if threshold is None else ["--threshold", str(threshold)])
    assert main(arguments) == 0
    lines = lines_of(capsys)
    starts = [0, 3, 7]  # of each run of equal frames
    frames = starts if threshold is None else range(len(ORDER))
    if only_changes:
        seen: Sequence[str | None] = [None, None]
        expected = []
        for start in starts:
            now = answers[ORDER[start]]
            changed = [name for name, old, new in zip(("star", "digit"), seen, now) if old != new]
            expected += [(start + hold - 1, name) for name in changed]
            seen = now
    else:
        expected = [(frame, name) for frame in frames for name in ("star", "digit")]
    assert [(line["frame"], line["name"]) for line in lines] == expected
    for line in lines:
        assert line["answer"] == answers[ORDER[line["frame"]]][["star", "digit"].index(line["name"])]
        name = str(source / f"{line['frame']}.png") if kind == "folder" else str(source)
        assert line["source"] == name
        assert line["kept_tokens"] == [20, 12, 4]
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_the_two_scenes_have_different_answers(answers: list[list[str]]) -> None:
    assert answers[0] != answers[1]


@pytest.mark.parametrize("option", ["--live", "--margin=1"])
def test_a_live_file_and_a_margin_are_heard(
    option: str, bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    assert main([str(clip), "--bundle", str(bundle), "--questions", str(questions), "--changes", option]) == 0
    lines = lines_of(capsys)
    assert bool(lines) == (option == "--live")  # no probability reaches 1
    assert [line["frame"] for line in lines] == sorted(line["frame"] for line in lines)


def test_events_are_saved_with_their_kept_tokens_and_the_oldest_go(
    bundle: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watch, "MOST_SAVED", 5)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "holiday.jpg").write_text("not ours")
    arguments = ["--bundle", str(bundle), "--questions", str(questions), "--save-frames", str(saved)]
    for _ in range(2):  # the second one deletes files of the first one, too
        assert main([str(write_folder(tmp_path / f"frames{_}")), *arguments]) == 0
        lines = lines_of(capsys)
        files = sorted(path.name for path in saved.glob("trio-watch-*"))
        told = [f"frame{line['frame']}-{line['name']}-{line['answer']}.jpg" for line in lines]
        assert [name.split("Z-")[1] for name in files] == sorted(told)[-5:]
        assert all(re.match(r"trio-watch-\d{8}T\d{6}\.\d{6}Z-", name) for name in files)
    assert (saved / "holiday.jpg").exists()
    with Image.open(saved / files[-1]) as drawing:
        assert drawing.width > 3 * 640


def test_names_of_questions_make_no_paths(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "saved").mkdir()
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{**ENTRIES[0], "name": "../../x/" + "y" * 150}]))
    source = str(write_folder(tmp_path / "frames"))
    saving = ["--save-frames", str(tmp_path / "saved")]
    assert main([source, "--bundle", str(bundle), "--questions", str(file), *saving]) == 0
    assert len(lines_of(capsys)) == len(list((tmp_path / "saved").iterdir())) == 3


def test_the_webhook_gets_each_line(
    bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_folder(tmp_path / "frames"))
    with serving(lambda _connection: []) as server:
        arguments = [
            "--bundle",
            str(bundle),
            "--questions",
            str(questions),
            "--webhook",
            f"{server.address}/gate",
        ]
        assert main([source, *arguments]) == 0
        assert [json.loads(body) for body in server.posts] == lines_of(capsys)
        assert set(server.post_paths) == {"/gate"}


def test_a_camera_that_goes_away_is_one_note_and_more_lines(bundle: Path, questions: Path) -> None:
    """Over HTTP, in a process of its own, until SIGTERM."""
    parts = [jpeg_part(scene) for scene in scenes()]

    def answer(connection: int) -> list[bytes]:
        return [parts[connection % 2]] * 30

    with serving(answer) as server, started(server.address, bundle, questions) as process:
        lines = [json.loads(next_line(process)) for _ in range(6)]
        code, errors = ended(process, signal.SIGTERM)
    assert code == 0
    assert {line["source"] for line in lines} == {server.address}
    assert [line["name"] for line in lines] == ["star", "digit"] * 3
    assert [line["answer"] for line in lines[:2]] == [line["answer"] for line in lines[4:]]
    assert "Traceback" not in errors
    notes = errors.splitlines()
    assert all(note.startswith(f"trio-watch: source '{server.address}': ") for note in notes)
    assert [note.endswith(": is back") for note in notes[:4]] == [False, True, False, True][: len(notes)]


def started(source: str, bundle: Path, questions: Path, *others: str) -> subprocess.Popen[str]:
    arguments = [source, "--bundle", str(bundle), "--questions", str(questions), "--threads", "1", *others]
    return subprocess.Popen(
        # A test run under nohup ignores SIGHUP, and so would the command.
        [
            sys.executable,
            "-c",
            f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); {COMMAND}",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, str]:
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        *itertools.product(["folder", "silent camera"], [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]),
        # One handler serves all signals, so that each other source needs one.
        ("live folder", signal.SIGINT),
        ("live file", signal.SIGTERM),
        ("camera", signal.SIGHUP),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_a_signal_ends_it_cleanly(
    kind: str, number: signal.Signals, bundle: Path, questions: Path, tmp_path: Path
) -> None:
    parts = [jpeg_part(scene) for scene in scenes()]
    with serving(lambda _connection: [parts[0]] * 30 if kind == "silent camera" else parts * 300) as server:
        server.holds = kind == "silent camera"
        if "folder" in kind:
            source = str(write_folder(tmp_path / "frames"))
        elif kind == "live file":
            source = str(write_clip(tmp_path / "clip.mp4"))
        else:
            source = server.address
        options = ["--live"] * kind.startswith("live") + ["--threshold", "0"]
        with started(source, bundle, questions, *options) as process:
            assert json.loads(next_line(process))["name"] == "star"
            code, errors = ended(process, number)
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("kind", ["folder", "camera"])
def test_a_reader_that_ends_ends_it_cleanly(kind: str, bundle: Path, questions: Path, tmp_path: Path) -> None:
    parts = [jpeg_part(scene) for scene in scenes()]
    with serving(lambda _connection: parts * 1000) as server:
        source = str(write_folder(tmp_path / "frames")) if kind == "folder" else server.address
        with started(source, bundle, questions, "--threshold", "0") as process:
            assert process.stdout is not None
            next_line(process)
            process.stdout.close()
            assert process.stderr is not None
            errors = process.stderr.read()
            assert (process.wait(timeout=120), errors) == (0, "")


@pytest.mark.parametrize(
    ("stream", "expected"), [("/dev/full", "expected room for the output"), (None, "standard output: ")]
)
def test_an_output_that_is_full_or_closed_is_one_line(
    stream: str | None, expected: str, bundle: Path, questions: Path, tmp_path: Path
) -> None:
    source = str(write_folder(tmp_path / "frames"))
    command = f'exec "$0" "$@" >{stream or "&-"}'
    arguments = [
        sys.executable,
        "-c",
        COMMAND,
        source,
        "--bundle",
        str(bundle),
        "--questions",
        str(questions),
    ]
    result = subprocess.run(["sh", "-c", command, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith(f"trio-watch: {expected}")
    assert result.stderr.count("\n") == 1


def test_the_file_in_the_documents_is_one_of_questions(tmp_path: Path) -> None:
    text = (PICTURES.parents[1] / "docs" / "camera.md").read_text(encoding="utf-8")
    file = tmp_path / "gate.json"
    file.write_text(text.partition("```json\n")[2].partition("```")[0])
    assert [question.name for question in read_questions(file)] == ["gate", "person", "bin"]


BAD_SOURCES = [
    "none.mp4",
    "/dev/null",
    "/dev/video99",
    "rtsp://127.0.0.1:9/1",
    "http://127.0.0.1:9/",
    "ftp://a/b",
    "",
]


@pytest.mark.parametrize("live_too", [False, True])
@pytest.mark.parametrize("source", BAD_SOURCES)
def test_a_bad_source_is_one_line(
    source: str, live_too: bool, bundle: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [source, "--bundle", str(bundle), "--questions", str(questions)]
    assert_refused([*arguments, *["--live"] * live_too], capsys, expected="expected ")


def assert_refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *, expected: str) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("trio-watch: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err


def test_a_folder_without_images_and_a_disguised_list_are_one_line(
    bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(bundle), "--questions", str(questions)]
    (tmp_path / "empty").mkdir()
    assert_refused([str(tmp_path / "empty"), *arguments], capsys, expected="expected images, got none")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n")
    assert_refused([str(tmp_path / "list.mp4"), *arguments], capsys, expected="expected frames of a video")
    os.mkfifo(tmp_path / "pipe")
    assert_refused([str(tmp_path / "pipe"), *arguments], capsys, expected="got a device or pipe")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--questions", "none.json"], "none.json: expected a readable file, got: No such file"),
        (["--questions", "/dev/null"], "/dev/null: expected a readable file, got: not a regular file"),
        (["--hold", "0"], "hold: expected a number of frames from 1, got 0"),
        (["--hold", "x"], "--hold"),
        (["--margin", "2"], "margin: expected 0..1, got 2.0"),
        (["--threshold", "nan"], "threshold: expected 0..255, got nan"),
        (["--webhook", "ftp://a/b"], "webhook: expected http://host/path"),
        (
            ["--save-frames", "none/there"],
            "--save-frames: expected a file in an existing folder, got none/there/",
        ),
        (["--bundle", "none"], "none"),
        (["--backend", "abacus"], "abacus"),
    ],
)
def test_a_bad_option_is_one_line(
    options: list[str],
    expected: str,
    bundle: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        str(write_folder(tmp_path / "frames")),
        "--bundle",
        str(bundle),
        "--questions",
        str(questions),
    ]
    assert_refused([*arguments, *options], capsys, expected=expected)


def test_a_question_that_the_bundle_cannot_ask_is_one_line(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{**ENTRIES[0], "text": "is there a star ? " * 40}]))
    source = str(write_folder(tmp_path / "frames"))
    assert_refused([source, "--bundle", str(bundle), "--questions", str(file)], capsys, expected="expected ")


def test_a_damaged_image_among_good_ones_ends_it_after_their_lines(
    bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "frames")
    (folder / "5.png").write_text("damaged")
    assert main([str(folder), "--bundle", str(bundle), "--questions", str(questions)]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["frame"] for line in captured.out.splitlines()] == [0, 0, 3, 3]
    assert captured.err.count("\n") == 1
    assert f"image '{folder / '5.png'}': expected an image" in captured.err


def test_no_thread_and_no_file_stays_open(
    bundle: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A camera's frames a thousand times, of connections that end: numbers of open files and threads stay."""
    monkeypatch.setattr(live, "FIRST_WAIT", 0.0)
    parts, counts = [jpeg_part(scene) for scene in scenes()], []
    with serving(lambda _connection: parts[:1] * 50) as server:
        frames = live.read_frames(server.address)
        for frame in itertools.takewhile(lambda frame: frame.number < 1000, frames):
            assert np.asarray(frame.image()).shape == (144, 192, 3)
            counts.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(counts[len(counts) // 2 :]) <= max(counts[: len(counts) // 2]) + 2
    assert len(server.paths) >= 19
