"""benchmarks/measured.py: users' reports become rows, and what cannot be true is refused."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING, Any

import measured
import pytest

from tests.documents import ROOT
from trio_edge.profiling import cli as cli_profile
from trio_edge.profiling.check import cli as cli_check

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

REPRODUCED = {
    "table": "efficiency-llava-1.5",
    "backend": "tensorrt",
    "versions": {"trio-edge": "0.1.0"},
    "machine": {"gpu": "a GPU", "name": "a processor", "system": "Linux 6"},
    "results": [
        {
            "row": "TRIO 64", "benchmark": "POPE", "limit": None, "answers": 8910, "score": 84.1,
            "first_tokens_s": 300.0, "total_s": 500.0, "flops": 2.1e12, "kv_bytes": 65e6,
            "visual_tokens": 576.0, "processed_tokens": 64.0, "published": {"POPE": 84.3},
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(reduced_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the three commands write; trio-reproduce's needs lmms-eval, so it is written down here."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli_check.main(["--bundle", str(reduced_bundle), "--json"]) == 0
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    arguments = [str(reduced_bundle), "--runs", "2", "--warm-up", "1", "--no-layers", "--json", str(file)]
    assert cli_profile.main(arguments) == 0
    return {
        "check": json.loads(text.getvalue()),
        "profile": json.loads(file.read_bytes()),
        "reproduce": REPRODUCED,
    }


def written(tmp_path: Path, *found: dict[str, Any]) -> str:
    file = tmp_path / "report.json"
    file.write_text("\n".join(json.dumps(one, indent=1) for one in found))
    return str(file)


def test_one_file_with_all_three_becomes_rows_of_the_page(
    reports: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = shutil.copyfile(ROOT / "docs" / "reproduce.md", tmp_path / "reproduce.md")
    assert measured.main([written(tmp_path, *reports.values()), "--page", str(page)]) == 0
    rows = [line for line in page.read_text().splitlines() if line.endswith("| report |")][1:]
    assert any("onnxruntime | check: answers | pass: 1 question" in row for row in rows)
    assert any("| profile: " in row and "first token" in row for row in rows)
    assert any("84.1 (published 84.3); first tokens 300.0 s" in row for row in rows)
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    again = page.read_text()
    assert measured.main([written(tmp_path, *reports.values()), "--page", str(page)]) == 0
    assert page.read_text() == again


def faster_than_it_can(found: dict[str, Any]) -> None:
    found["results"][0]["first_tokens_s"] = 1.0


def a_score_of_a_thousand(found: dict[str, Any]) -> None:
    found["results"][0]["score"] = 1000.0


def few_answers(found: dict[str, Any]) -> None:
    found["results"][0]["answers"] = 7


def more_kept_than_came_in(found: dict[str, Any]) -> None:
    found["results"][0]["processed_tokens"] = 600.0


def times_the_wrong_way_round(found: dict[str, Any]) -> None:
    found["results"][0]["total_s"] = 1.0


def above_the_ceiling(found: dict[str, Any]) -> None:
    found["bundles"][0]["graphs"][0]["of_ceiling"] = 1.5


def a_prefill_after_the_first_token(found: dict[str, Any]) -> None:
    found["bundles"][0]["prefill_ms"]["p50"] = 1e6


def tokens_faster_than_memory(found: dict[str, Any]) -> None:
    found["bundles"][0]["tokens_per_s"] = 1e12


def passed_with_a_failure(found: dict[str, Any]) -> None:
    found["checks"][0]["status"] = "fail"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("reproduce", faster_than_it_can, "FLOP/s, got"),
        ("reproduce", a_score_of_a_thousand, "expected a score of 0 to 100, got 1000"),
        ("reproduce", few_answers, "expected a whole benchmark, got 7 answers"),
        ("reproduce", more_kept_than_came_in, "expected at most 576.0 tokens kept"),
        ("reproduce", times_the_wrong_way_round, "expected 0 < first tokens <= all"),
        ("profile", above_the_ceiling, "at most the machine's measured rate, got 1.50 times"),
        ("profile", a_prefill_after_the_first_token, "expected 0 < prefill <= first token"),
        ("profile", tokens_faster_than_memory, "bytes/s for tokens"),
        ("check", passed_with_a_failure, "expected 'passed' to be what the checks say"),
    ],
)
def test_what_cannot_be_true_is_refused(
    kind: str,
    change: Callable[[dict[str, Any]], None],
    message: str,
    reports: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = copy.deepcopy(reports[kind])
    change(found)
    page = shutil.copyfile(ROOT / "docs" / "reproduce.md", tmp_path / "reproduce.md")
    before = page.read_text()
    assert measured.main([written(tmp_path, found), "--page", str(page)]) == 2
    assert message in capsys.readouterr().err
    assert page.read_text() == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"checks": 1, "results": 2}', "no JSON"])
def test_another_file_is_refused_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    assert measured.main([str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
