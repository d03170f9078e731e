"""trio-eval: counting, intervals, baselines and files of questions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.pictures import random_picture
from trio_edge.calibration import cli_eval
from trio_edge.calibration.baselines import BASELINES, baseline
from trio_edge.calibration.evaluation import Accuracy

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Three questions about one picture, the second with an answer that no model gives."""
    random_picture(48, 48).save(tmp_path / "p.png")
    lines = [
        {"image": "p.png", "question": f"w{i}", "answer": "no such words", "kind": "k"} for i in range(3)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("count", "keep"), [(51, 14), (14, 14), (9, 3), (30, 1)])
def test_baselines_keep_k_tokens_in_order(name: str, count: int, keep: int) -> None:
    kept = baseline(name, seed=1, base_tokens=9)(0, np.arange(count, dtype=np.int32), keep)
    assert len(set(kept.tolist())) == keep
    assert kept.tolist() == sorted(kept.tolist())
    assert 0 <= kept.min() <= kept.max() < count


def test_base_tile_first_fills_up_with_others() -> None:
    kept = baseline("base-tile-first", seed=0, base_tokens=4)(0, np.arange(20, dtype=np.int32), 6)
    assert kept[:4].tolist() == [0, 1, 2, 3]
    assert (kept[4:] >= 4).all()


def test_wilson_interval_of_a_known_case() -> None:
    """8 of 10: 0.490 to 0.943 (Wilson 1927, formula with z = 1.96)."""
    low, high = Accuracy(correct=8, total=10).interval
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=2e-4)


@pytest.mark.parametrize("selection", ["bundle", *BASELINES])
def test_evaluation_writes_every_outcome(
    selection: str, reduced_bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        str(reduced_bundle),
        "--data",
        str(questions),
        "--json",
        str(tmp_path / "out.json"),
        "--quiet",
    ]
    assert cli_eval.main([*arguments, "--selection", selection]) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["questions"] == 3
    assert result["accuracy"] == 0.0
    assert [outcome["sample_id"] for outcome in result["outcomes"]] == ["1", "2", "3"]
    assert result["average_keep"] == pytest.approx((51 + 14 + 6) / (3 * 51))
    assert f"selection: {selection}" in capsys.readouterr().out


def test_a_right_answer_counts(reduced_bundle: Path, questions: Path, tmp_path: Path) -> None:
    arguments = [
        str(reduced_bundle),
        "--data",
        str(questions),
        "--json",
        str(tmp_path / "out.json"),
        "--quiet",
    ]
    assert cli_eval.main(arguments) == 0
    answered = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    lines[1]["answer"] = answered[1]["answered"].upper()
    questions.write_text("\n".join(json.dumps(line) for line in lines))
    assert cli_eval.main(arguments) == 0
    outcomes = json.loads((tmp_path / "out.json").read_text())["outcomes"]
    assert [outcome["correct"] for outcome in outcomes] == [False, True, False]


@pytest.mark.parametrize(
    ("content", "expected"),
    [("", "at least one question"), ("{", "line 1"), ('{"image": "p.png"}', "line 1"), ("[]", "line 1")],
    ids=["empty", "no_json", "no_question", "a_list"],
)
def test_a_broken_file_of_questions_gives_one_line(
    content: str, expected: str, reduced_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    assert cli_eval.main([str(reduced_bundle), "--data", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert expected in error


def test_the_synthetic_set_is_answered(reduced_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_eval.main([str(reduced_bundle), "--count", "3", "--quiet"]) == 0
    assert "average keep" in capsys.readouterr().out
