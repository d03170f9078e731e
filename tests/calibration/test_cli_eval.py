"""trio-eval: what it reports, and one line for everything a user can do wrong."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from trio_edge.calibration.evaluate import cli as cli_eval
from trio_edge.calibration.evaluate.answering import BASELINES
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path


def evaluated(tmp_path: Path, *arguments: Any) -> dict[str, Any]:
    """Run trio-eval and return its report."""
    out = tmp_path / "report.json"
    assert cli_eval.main([*map(str, arguments), "--json", str(out), "--quiet"]) == 0
    report: dict[str, Any] = json.loads(out.read_text())
    return report


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write_questions(tmp_path, questions_about(6))


@pytest.fixture(scope="module")
def report(
    keep_all_bundle: Path, reduced_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Keep-all and two selections of one reduced bundle."""
    folder = tmp_path_factory.mktemp("report")
    questions = write_questions(folder, questions_about(6))
    selections = ("--selection", "bundle", "--selection", "random")
    return evaluated(folder, reduced_bundle, "--reference", keep_all_bundle, "--data", questions, *selections)


def test_the_reference_comes_first_and_every_selection_is_a_run(report: dict[str, Any]) -> None:
    methods = [(run["run"]["method"], run["run"]["is_reference"]) for run in report["runs"]]
    assert methods == [("keep-all", True), ("trio", False), ("random", False)]


def test_visual_tokens_are_the_true_average_over_layers(report: dict[str, Any]) -> None:
    """51 tokens of a 48x48 image, 3 layers, stages keep 14 and 6: (51 + 14 + 6) / 3."""
    _, trio, random = report["runs"]
    outcome = trio["outcomes"][0]
    assert (outcome["visual_tokens"], outcome["processed_tokens"]) == (51, pytest.approx(71 / 3))
    assert random["processed_tokens"] == trio["processed_tokens"]
    assert trio["average_keep"] == pytest.approx(
        trio["processed_tokens"] / report["runs"][0]["visual_tokens"]
    )


def test_a_reduced_run_is_compared_on_the_same_questions(report: dict[str, Any]) -> None:
    full, trio, random = report["runs"]
    assert full["against_reference"] is None
    same = [a["reading"] == b["reading"] for a, b in zip(trio["outcomes"], full["outcomes"])]
    assert trio["against_reference"]["agreement"]["value"] == pytest.approx(sum(same) / 6)
    assert trio["against_reference"]["flops_ratio"] > 1.0
    assert random["flops"] < trio["flops"]  # the same tokens without probes and NMS
    assert report["data"]["compared"] == 6


def test_the_divergence_is_that_of_the_first_tokens_logits(
    report: dict[str, Any], keep_all_bundle: Path, reduced_bundle: Path, questions: Path
) -> None:
    first = []
    for bundle in (keep_all_bundle, reduced_bundle):
        with Pipeline.from_bundle(bundle, threads=1) as pipeline:
            generation = pipeline.generate(questions.parent / "p0.png", "w0 w0", max_new_tokens=1)
            assert generation.text is not None
            shifted = generation.first_logits.astype(np.float64)
            first.append(shifted - np.log(np.exp(shifted).sum()))
    expected = float((np.exp(first[0]) * (first[0] - first[1])).sum())
    assert report["runs"][1]["outcomes"][0]["first_token_kl"] == pytest.approx(expected, rel=1e-4)


def test_the_report_says_how_it_was_measured(report: dict[str, Any]) -> None:
    conditions = report["conditions"]
    assert {"python", "trio-edge", "numpy", "onnxruntime"} <= conditions["versions"].keys()
    assert (conditions["backend"], conditions["threads"]) == ("onnxruntime", 1)
    assert {"system", "architecture", "processor", "cpus"} == conditions["machine"].keys()


def test_a_bundle_compared_with_itself_agrees(keep_all_bundle: Path, questions: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(keep_all_bundle, tmp_path / "copy")
    text = (copy / "trio.json").read_bytes() + b"\n"  # other bytes, so another bundle
    (copy / "trio.json").write_bytes(text)
    report = evaluated(tmp_path, copy, "--reference", keep_all_bundle, "--data", questions)
    against = report["runs"][1]["against_reference"]
    assert against["agreement"]["value"] == 1.0
    assert against["first_token_kl"] == pytest.approx(0.0, abs=1e-6)
    assert against["difference"]["interval_95"] == [0.0, 0.0]
    assert against["flops_ratio"] == 1.0


def test_right_answers_count(reduced_bundle: Path, questions: Path, tmp_path: Path) -> None:
    texts = [
        o["text"] for o in evaluated(tmp_path, reduced_bundle, "--data", questions)["runs"][0]["outcomes"]
    ]
    lines = questions_about(6)
    for index in (1, 4):
        lines[index]["answer"] = f" {texts[index].upper()}. "
    right = write_questions(tmp_path, [{**line, "kind": f"k{i % 2}"} for i, line in enumerate(lines)])
    run = evaluated(tmp_path, reduced_bundle, "--data", right)["runs"][0]
    assert [outcome["score"] for outcome in run["outcomes"]] == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert {kind: part["value"] for kind, part in run["by_kind"].items()} == {"k0": 1 / 3, "k1": 1 / 3}


def test_yes_no_questions_get_popes_rates(reduced_bundle: Path, tmp_path: Path) -> None:
    """The random model never says no, which counts as yes."""
    lines = [{**line, "answer": "yes" if i < 4 else "no"} for i, line in enumerate(questions_about(6))]
    report = evaluated(tmp_path, reduced_bundle, "--data", write_questions(tmp_path, lines))
    assert report["data"]["metric"] == "yes-no"
    rates = report["runs"][0]["yes_no"]
    assert rates == pytest.approx(
        {"accuracy": 4 / 6, "precision": 4 / 6, "recall": 1.0, "f1": 0.8, "yes_ratio": 1.0}
    )


def test_tables_are_printed(
    keep_all_bundle: Path, reduced_bundle: Path, questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(reduced_bundle), "--reference", str(keep_all_bundle), "--count", "3", "--quiet"]
    arguments += ["--data", str(questions)]
    assert cli_eval.main([*arguments, "--selection", "random"]) == 0
    output = capsys.readouterr().out
    for words in ("(random)", "accuracy %", "minus keep-all", "kept on average", "FLOPs", "3 of 3 questions"):
        assert words in output


def test_a_damaged_image_in_the_middle_loses_no_other_answer(
    reduced_bundle: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (tmp_path / "p1.png").read_bytes()
    (tmp_path / "p1.png").write_bytes(whole[: len(whole) // 2])  # its header is good
    out, work = tmp_path / "report.json", tmp_path / "work"
    arguments = [
        str(reduced_bundle),
        "--data",
        str(questions),
        "--work",
        str(work),
        "--json",
        str(out),
        "--quiet",
    ]
    assert cli_eval.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert f"{questions}:2: " in error
    assert "(and 1 more)" in error
    assert json.loads(out.read_text())["data"]["compared"] == 4
    (tmp_path / "p1.png").write_bytes(whole)
    assert cli_eval.main(arguments) == 0  # in the same folder
    assert json.loads(out.read_text())["data"]["compared"] == 6


REQUESTS: dict[str, tuple[list[str], str]] = {
    "no_bundle": ([], "BUNDLE...: expected a value, got none"),
    "not_a_bundle": (["nowhere"], "expected a bundle folder"),
    "twice": (["B", "B"], "each bundle once"),
    "reference_that_selects": (["B", "--reference", "B"], "keep-all bundle"),
    "reference_missing": (["B", "--reference", "nowhere"], "expected a bundle folder"),
    "selection_of_keep_all": (["A", "--selection", "random"], "bundle with stages"),
    "unknown_selection": (["B", "--selection", "best"], "--selection"),
    "unknown_metric": (["B", "--metric", "bleu"], "--metric"),
    "metric_that_does_not_fit": (["B", "--data", "Q", "--metric", "vqa"], "expected 10 answers"),
    "no_data": (["B", "--data"], "--data: expected a value, got none"),
    "missing_data": (["B", "--data", "nowhere.jsonl"], "JSON-lines file"),
    "count_zero": (["B", "--count", "0"], "--count"),
    "unknown_split": (["B", "--data", "Q", "--split", "val"], "of split 'val'"),
    "answer_tokens_zero": (["B", "--answer-tokens", "0"], "--answer-tokens"),
    "negative_threads": (["B", "--threads", "-1"], "--threads"),
    "unknown_backend": (["B", "--backend", "abacus"], "backend"),
    "json_nowhere": (["B", "--json", "no/such/x.json"], "--json"),
    "work_is_a_file": (["B", "--work", "Q"], "expected a folder"),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_a_bad_request_gives_one_line(
    name: str,
    keep_all_bundle: Path,
    reduced_bundle: Path,
    questions: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = REQUESTS[name]
    values = {"A": keep_all_bundle, "B": reduced_bundle, "Q": questions}
    arguments = arguments if "--data" in arguments else [*arguments, "--data", "Q"]
    assert cli_eval.main([str(values.get(argument, argument)) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert expected in error


def test_sigterm_leaves_no_temporary_folder(
    reduced_bundle: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert cli_eval.main([str(reduced_bundle), "--data", str(questions), "--quiet"]) == 130
    assert capsys.readouterr().err.strip() == "trio-eval: interrupted"
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize("selection", BASELINES)
def test_a_baseline_has_the_bundles_schedule(
    selection: str, reduced_bundle: Path, questions: Path, tmp_path: Path
) -> None:
    report = evaluated(tmp_path, reduced_bundle, "--data", questions, "--selection", selection)
    assert report["runs"][0]["run"]["selection"] == selection
    assert report["runs"][0]["outcomes"][0]["processed_tokens"] == pytest.approx(71 / 3)


@pytest.mark.parametrize("budget", ["prompt", "image"])
def test_questions_about_several_images(
    budget: Literal["prompt", "image"], checkpoint: Path, tmp_path: Path
) -> None:
    """Tokens of all images count, and each baseline has the bundle's schedule."""
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)), budget=budget)
    bundle = export(checkpoint, schedule=schedule, max_images=3)
    keep_all = export(checkpoint, max_images=3)
    names = (["p0.png", "p1.png"], ["p0.png"], ["p0.png", "p0.png", "p2.png"])
    questions = write_questions(
        tmp_path, [{"images": name, "question": "w1 w2 ?", "answer": "w1"} for name in names]
    )
    chosen = [part for name in ("bundle", *BASELINES) for part in ("--selection", name)]
    report = evaluated(tmp_path, bundle, "--reference", keep_all, "--data", questions, *chosen)
    counts = [outcome["visual_tokens"] for outcome in report["runs"][0]["outcomes"]]
    with Pipeline.from_bundle(keep_all, threads=1) as pipeline:
        for name, outcome in zip(names, report["runs"][0]["outcomes"]):
            answer = pipeline.generate([tmp_path / one for one in name], "w1 w2 ?", max_new_tokens=16)
            assert answer.text == outcome["text"]
            assert answer.statistics.visual_tokens == outcome["visual_tokens"]
    assert counts[1] < min(counts[0], counts[2])
    for run in report["runs"][1:]:
        processed = [outcome["processed_tokens"] for outcome in run["outcomes"]]
        assert processed == pytest.approx([(count + 14 + 6) / 3 for count in counts])
    data = json.loads((tmp_path / "report.json").read_text())["data"]
    assert data["compared"] == 3


def test_tokens_selected_before_the_decoder_count_image_by_image(checkpoint: Path, tmp_path: Path) -> None:
    bundle = export(checkpoint, token_method="uniform", token_keep=0.3, max_images=2)
    questions = write_questions(
        tmp_path,
        [{"images": ["p0.png", "p1.png"][:count], "question": "w1", "answer": "w1"} for count in (1, 2)],
    )
    (run,) = evaluated(tmp_path, bundle, "--data", questions)["runs"]
    one, two = run["outcomes"]
    assert two["processed_tokens"] == 2 * one["processed_tokens"] < two["visual_tokens"]
    assert two["flops"] > one["flops"]
