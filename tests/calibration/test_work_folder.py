"""Outcomes survive: kills and cut lines give what one uninterrupted run gives."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.calibration.question_files import questions_about, write_questions
from tests.pictures import random_picture
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.runtime.bundle.files import lock_folder, unlock_folder

QUESTIONS = 40
TIMES = ("ttft_ms", "decode_ms")
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from trio_edge.calibration.evaluate.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions"), questions_about(QUESTIONS))


@pytest.fixture(scope="module")
def arguments(keep_all_bundle: Path, reduced_bundle: Path, questions: Path) -> list[str]:
    """One reduced bundle, its random selection, and keep-all."""
    selections = ["--selection", "bundle", "--selection", "random"]
    return [
        str(reduced_bundle), "--reference", str(keep_all_bundle), "--data", str(questions), "--quiet", *selections
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return outcomes_of(arguments, tmp_path_factory.mktemp("uninterrupted"))


def outcomes_of(arguments: list[str], folder: Path, *more: str) -> list[Any]:
    """Run trio-eval and return every run's outcomes without what the clock gave."""
    out = folder / "report.json"
    assert cli_eval.main([*arguments, "--json", str(out), *more]) == 0
    runs = json.loads(out.read_text())["runs"]
    return [
        [{k: v for k, v in outcome.items() if k not in TIMES} for outcome in run["outcomes"]] for run in runs
    ]


def num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def wait_until(condition: Any, *, seconds: float = 60.0) -> None:
    for _ in range(round(seconds / 0.005)):
        if condition():
            return
        time.sleep(0.005)
    assert condition()


def test_a_killed_run_goes_on_where_it_stopped(
    arguments: list[str], uninterrupted: list[Any], tmp_path: Path
) -> None:
    work, moment = tmp_path / "work", random.Random(1).randrange(5, QUESTIONS)
    process = subprocess.Popen([*COMMAND, *arguments, "--work", str(work)])
    wait_until(lambda: num_lines(work) >= moment)
    process.kill()
    process.wait()
    done = num_lines(work)
    assert moment <= done < 3 * QUESTIONS
    assert outcomes_of(arguments, tmp_path, "--work", str(work)) == uninterrupted
    assert num_lines(work) == 3 * (QUESTIONS + 1)  # nothing was asked twice


def test_a_bundle_that_cannot_be_loaded_is_one_line(
    reduced_bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are whole when the run is planned; loading finds a graph that does not fit."""
    import shutil

    copy = shutil.copytree(reduced_bundle, tmp_path / "copy")
    manifest = json.loads((copy / "trio.json").read_text())
    vision = next(graph for graph in manifest["graphs"] if graph["name"] == "vision")
    vision["inputs"][0]["dtype"] = "int32"
    (copy / "trio.json").write_text(json.dumps(manifest))
    assert cli_eval.main([str(copy), "--data", str(questions), "--quiet"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "vision.onnx" in error


@pytest.fixture
def small(tmp_path: Path, reduced_bundle: Path) -> tuple[list[str], Path]:
    """Arguments of a run of three questions, and its work folder after it ended."""
    path = write_questions(tmp_path, questions_about(3))
    work = tmp_path / "work"
    arguments = [str(reduced_bundle), "--data", str(path), "--quiet", "--work", str(work)]
    assert cli_eval.main(arguments) == 0
    return arguments, work


def only_file(work: Path) -> Path:
    (path,) = work.glob("*.jsonl")
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli_eval.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_a_cut_last_line_is_asked_again(small: tuple[list[str], Path]) -> None:
    arguments, work = small
    whole = only_file(work).read_bytes()
    only_file(work).write_bytes(whole[:-40])
    assert cli_eval.main(arguments) == 0
    assert only_file(work).read_bytes().count(b"\n") == whole.count(b"\n")


def test_a_file_cut_in_its_first_line_is_begun_again(small: tuple[list[str], Path]) -> None:
    arguments, work = small
    whole = only_file(work).read_bytes()
    only_file(work).write_bytes(whole[:40])
    assert cli_eval.main(arguments) == 0
    assert only_file(work).read_bytes().count(b"\n") == whole.count(b"\n")


def test_a_broken_line_in_the_middle_is_named(
    small: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, work = small
    lines = only_file(work).read_bytes().split(b"\n")
    lines[1] = b"{"
    only_file(work).write_bytes(b"\n".join(lines))
    assert f"{only_file(work)}:2: expected an outcome" in refusal(arguments, capsys)


def test_a_changed_image_is_asked_again(small: tuple[list[str], Path], tmp_path: Path) -> None:
    arguments, work = small
    random_picture(48, 48, seed=9).save(tmp_path / "p1.png")
    assert cli_eval.main(arguments) == 0
    assert num_lines(work) == 1 + 3 + 1


def test_other_questions_are_refused(
    small: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = small
    assert "expected outcomes of these questions" in refusal([*arguments, "--count", "2"], capsys)


def test_other_bundles_are_refused(
    small: tuple[list[str], Path], keep_all_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, _ = small
    assert "expected outcomes of these bundles" in refusal([str(keep_all_bundle), *arguments[1:]], capsys)


def test_one_more_bundle_is_welcome(small: tuple[list[str], Path], keep_all_bundle: Path) -> None:
    arguments, work = small
    assert cli_eval.main([str(keep_all_bundle), *arguments]) == 0
    assert num_lines(work) == 2 * (1 + 3)


def test_other_files_are_refused(small: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, work = small
    (work / "notes.txt").write_text("mine")
    assert "notes.txt: expected a file of outcomes" in refusal(arguments, capsys)


def test_another_schema_is_refused(small: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments, work = small
    text = only_file(work).read_text().replace('"schema_version":2', '"schema_version":9', 1)
    only_file(work).write_text(text)
    assert "schema_version 9" in refusal(arguments, capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such lock")
def test_a_folder_in_use_is_refused(
    small: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, work = small
    lock = lock_folder(work)
    try:
        assert "got a second one" in refusal(arguments, capsys)
    finally:
        unlock_folder(lock)
