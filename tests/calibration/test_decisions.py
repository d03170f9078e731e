"""Probabilities against what is right: measures, fitted temperatures, and the two commands that use them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.bundles import export
from tests.checkpoints import save_checkpoint
from tests.pictures import random_picture
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.evaluate.decisions import (
    Judged,
    at_temperature,
    fitted_temperature,
    question_of,
    reliability,
    right_option,
    with_options,
)
from trio_edge.calibration.questions import read_questions
from trio_edge.calibration.search import cli as cli_calibrate
from trio_edge.runtime.bundle.errors import BundleError, DataError
from trio_edge.runtime.decisions.questions import Question
from trio_edge.runtime.decisions.wording import read_temperatures
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Sequence


def judged(*shares: float, right: int, **fields: Any) -> Judged:
    return Judged(kind="choice", shares=shares, right=right, label_mass=1.0, **fields)


def data(folder: Path, lines: Sequence[dict[str, Any]], num_images: int = 8) -> Path:
    """Write a file of questions about a few images in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        random_picture(48, 48, seed=number).save(folder / f"{number}.png")
    rows = [{"image": f"{place % num_images}.png", **line} for place, line in enumerate(lines)]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Measures


def test_measures_of_known_probabilities() -> None:
    found = reliability(
        [
            judged(0.8, 0.2, right=0, turned=(0.4, 0.6)),
            judged(0.3, 0.7, right=0, turned=(0.2, 0.8)),
            judged(0.1, 0.15, 0.75, right=2),
        ]
    )
    assert found.brier == pytest.approx((0.08 + 0.98 + 0.01 + 0.0225 + 0.0625) / 3)
    assert found.log_loss == pytest.approx(-np.log([0.8, 0.3, 0.75]).mean())
    assert found.confidence == pytest.approx(0.75)
    assert [(one.questions, one.accuracy) for one in found.bins] == [(2, 0.5), (1, 1.0)]
    assert found.calibration_error == pytest.approx((2 * abs(0.725 - 0.5) + abs(0.8 - 1.0)) / 3)
    assert found.changed_by_order == 0.5
    assert reliability([judged(0.5, 0.5, right=1)]).changed_by_order is None


def test_bins_hold_every_confidence() -> None:
    found = reliability(
        [judged(1.0, 0.0, right=0), judged(0.0, 0.0, 1.0, right=1), judged(0.1, 0.9, right=1)]
    )
    assert [(one.questions, one.accuracy) for one in found.bins] == [(3, 2 / 3)]
    assert np.isfinite(found.log_loss)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_a_temperature_is_found_again(temperature: float) -> None:
    """Answers drawn from probabilities that are then sharpened: dividing by the temperature brings them back."""
    random, drawn = np.random.default_rng(0), []
    for shares in random.dirichlet(np.ones(4), size=2000):
        right = int(random.choice(4, p=shares))
        drawn.append(at_temperature(judged(*shares.tolist(), right=right), 1 / temperature))
    assert fitted_temperature(drawn) == pytest.approx(temperature, rel=0.08)


def test_a_temperature_and_its_inverse_change_nothing() -> None:
    one = judged(0.5, 0.3, 0.2, right=0)
    np.testing.assert_allclose(
        at_temperature(at_temperature(one, 3.0), 1 / 3.0).shares, one.shares, rtol=1e-12
    )


# Options


def test_options_are_choices_or_yes_and_no_or_all_answers_of_a_kind(tmp_path: Path) -> None:
    path = data(tmp_path, [
        {"question": "w1", "answer": "w2", "kind": "colour"},
        {"question": "w1", "answer": "W3.", "kind": "colour"},
        {"question": "w4", "answer": "Yes", "kind": "there"},
        {"question": "w5", "answer": "b", "choices": ["w6", "w7", "w8"], "kind": "which"},
    ])  # fmt: skip
    samples = with_options(read_questions(path))
    assert [question_of(sample) for sample in samples] == [
        Question.choice("w1", ["w2", "w3"]),
        Question.choice("w1", ["w2", "w3"]),
        Question.yes_no("w4"),
        Question.choice("w5", ["w6", "w7", "w8"]),
    ]
    assert [right_option(sample) for sample in samples] == [0, 1, 0, 1]


def test_a_kind_with_one_answer_is_refused(tmp_path: Path) -> None:
    path = data(tmp_path, [{"question": "w1", "answer": "w2"}, {"question": "w3", "answer": "w2"}])
    with pytest.raises(
        DataError, match=r"questions.jsonl:1: expected 2..255 different answers to questions of the kind"
    ):
        with_options(read_questions(path))


# Commands


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    lines = [{"question": f"w{place % 5}", "answer": f"w{20 + place % 3}"} for place in range(60)]
    return data(tmp_path / "data", lines)


def test_trio_eval_judges_probabilities(
    reduced_bundle: Path,
    keep_all_bundle: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report, plot = tmp_path / "report.json", tmp_path / "plot.svg"
    arguments = [
        str(reduced_bundle),
        "--reference",
        str(keep_all_bundle),
        "--data",
        str(questions),
        "--count",
        "6",
    ]
    arguments += ["--decide", "--selection", "bundle", "--selection", "random", "--quiet"]
    assert cli_eval.main([*arguments, "--json", str(report)]) == 0
    assert "calibration error" in capsys.readouterr().out
    script = Path(__file__).parents[2] / "benchmarks" / "reliability.py"
    subprocess.run([sys.executable, str(script), str(report), str(plot)], check=True)
    assert b"<svg" in plot.read_bytes()
    runs = json.loads(report.read_text())["runs"]
    assert len(runs) == 3
    samples = with_options(read_questions(questions, count=6))
    with Pipeline.from_bundle(keep_all_bundle, threads=1) as pipeline:
        decisions = [pipeline.decide(list(sample.images), question_of(sample))[0] for sample in samples]
    for sample, decision, outcome in zip(samples, decisions, runs[0]["outcomes"]):
        assert outcome["judged"]["shares"] == pytest.approx(decision.probabilities, rel=1e-6)
        assert (outcome["text"], outcome["judged"]["right"]) == (decision.choice, right_option(sample))
    kept = [run["processed_tokens"] for run in runs]
    assert kept[0] > kept[1] == kept[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decide", "--selection", "base-tile-first"], "nor such a --selection, got base-tile-first"),
        (["--decide", "--suffix", "w1"], "nor such a --selection, got --suffix"),
        (["--decide", "--system", "w1"], "nor such a --selection, got --system"),
        (["--decide", "--selection", "wrong-image"], "nor such a --selection, got wrong-image"),
    ],
)
def test_trio_eval_refuses_in_one_line(
    options: list[str],
    message: str,
    reduced_bundle: Path,
    questions: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli_eval.main([str(reduced_bundle), "--data", str(questions), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_trio_calibrate_stores_temperatures(
    reduced_bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    asked = Question.choice("w1", ["w20", "w21", "w22"])
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        (before,) = pipeline.decide(random_picture(48, 48), asked)
    arguments = [str(bundle), "--temperatures", "--samples", str(questions), "--quiet"]
    assert cli_calibrate.main(arguments) == 0
    assert "choice" in capsys.readouterr().out
    stored = read_temperatures(bundle)
    assert stored.keys() == {"choice"}
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        (after,) = pipeline.decide(random_picture(48, 48), asked)
    logs = np.log(before.probabilities) / stored["choice"]
    np.testing.assert_allclose(np.log(after.probabilities), logs - np.logaddexp.reduce(logs), rtol=1e-9)
    assert after.label_mass == before.label_mass
    assert cli_calibrate.main(arguments) == 0  # again: what is stored does not count
    assert read_temperatures(bundle) == pytest.approx(stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected MODEL"),
        (["--temperatures"], "--temperatures: expected a bundle and --samples"),
        (["BUNDLE", "--temperatures"], "--temperatures: expected a bundle and --samples"),
        (["BUNDLE", "--temperatures", "--samples", "DATA", "--out", "x"], "besides, got --out"),
        (["BUNDLE", "--temperatures", "--samples", "DATA", "--layers", "1"], "besides, got --layers"),
        (
            ["BUNDLE", "--temperatures", "--samples", "DATA", "--count", "9"],
            "expected at least 20 samples of one kind",
        ),
        (["BUNDLE", "--samples", "DATA"], "expected --out, got none"),
    ],
)
def test_trio_calibrate_refuses_in_one_line(
    options: list[str], message: str, reduced_bundle: Path, questions: Path, tmp_path: Path, capsys: Any
) -> None:
    bundle = shutil.copytree(reduced_bundle, tmp_path / "bundle")
    names = {"BUNDLE": str(bundle), "DATA": str(questions)}
    assert cli_calibrate.main([*(names.get(option, option) for option in options), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error or message == "expected MODEL"
    assert len(error.strip().splitlines()) == 1
    assert not (bundle / "temperatures.json").exists()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"rank": 1}', '{"choice": 0}', '{"choice": "1"}', '{"choice": 1e9}', "{" * 9]
)
def test_broken_temperatures_are_one_line(content: str, tmp_path: Path) -> None:
    bundle = export(save_checkpoint(tmp_path / "ck"), tmp_path / "bundle")
    (bundle / "temperatures.json").write_text(content)
    with (
        Pipeline.from_bundle(bundle, threads=1) as pipeline,
        pytest.raises(BundleError, match=r"temperatures.json: expected temperatures by kind of question"),
    ):
        pipeline.decide(None, Question.choice("w1", ["w2", "w3"]))
