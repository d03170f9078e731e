"""benchmarks/peers.py without its peers: what the tables say, and rows of runtimes that are missing or fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REQUEST = {"new_tokens": 3, "threads": 1}


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import peers

    return peers


@pytest.fixture
def row(peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A row whose model is there, and whose script is written by ``answering``."""
    monkeypatch.setattr(peers, "RUNS", tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(bytes(20_000_000))
    return peers.Row("ours", "script.py", Path(sys.executable), tmp_path / "model")


def answering(row: Any, *, tokens: int = 2, before: str = "") -> Any:
    """Give the row a script that prints what a run prints, and return the row."""
    found = {"load": [2, 1], "first": [4, 3], "tokens": tokens * [[0.02, 0.01]], "prompt_tokens": 7}
    text = json.dumps({**found, "versions": {"someone": "1.2", "else": "3" * 300}})
    (row.model.parent / "script.py").write_text(f"{before}\nprint('a warning')\nprint({text!r})\n")
    return row


def test_a_row_has_medians_with_the_smallest_and_largest_value(peers: Any, row: Any) -> None:
    for load, decode in ((1, 0.010), (5, 0.030), (2, 0.011)):
        tokens = [(9.0, decode), (9.0, decode), (9.0, 99.0)]
        row.rounds.append(
            peers.Measured((8, load), (7, 3), tokens, 600, {}, resident=2e9 + load, anonymous=1e9)
        )
    processor, wall = peers.tables([row]).split("\n\n")
    cells = [cell.strip() for cell in processor.splitlines()[2].strip("|").split("|")]
    assert cells[:4] == ["ours", "2.00 (1.00 – 5.00)", "3.00 (3.00 – 3.00)", "11.0 (10.0 – 30.0)"]
    assert cells[4:] == ["2.00 (2.00 – 2.00)", "1.00 (1.00 – 1.00)", "0.02 GB", "600"]
    assert "| ours | 8.00 (8.00 – 8.00) | 7.00 (7.00 – 7.00) | 9000.0" in wall


def test_an_answer_is_measured_in_a_process_of_its_own(peers: Any, row: Any) -> None:
    peers.run_round(
        [answering(row, before="held = bytes(40_000_000); import time; time.sleep(0.3)")], REQUEST, seconds=60
    )
    (measured,) = row.rounds
    assert (measured.load, measured.first, measured.versions) == (
        [2, 1],
        [4, 3],
        {"someone": "1.2", "else": "3" * 300},
    )
    assert measured.resident > measured.anonymous > 10e6 / 4


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ({"before": "raise SystemExit('no such operator')"}, "exit code 1: no such operator"),
        ({"tokens": 1}, "gave 2 of 3 tokens"),
    ],
)
def test_a_peer_that_fails_is_a_row_that_says_why_and_is_not_asked_again(
    peers: Any, row: Any, script: dict[str, Any], reason: str
) -> None:
    for _ in range(2):
        peers.run_round([answering(row, **script)], REQUEST, seconds=60)
    assert row.reason == reason
    assert f"| ours | {reason} |" in peers.tables([row])


def test_a_peer_that_is_not_installed_is_a_row_that_says_so(peers: Any, tmp_path: Path) -> None:
    for python in (None, tmp_path / "bin/python"):
        row = peers.Row("theirs", "script.py", python, tmp_path / "model")
        peers.run_round([row], REQUEST, seconds=60)
        assert "| theirs | not installed: see --install |" in peers.tables([row])


def test_a_model_that_cannot_be_made_is_a_row_with_the_last_line_of_the_error(
    peers: Any, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "raise ValueError('unknown architecture')"]
    row = peers.Row("theirs", "script.py", Path(sys.executable), tmp_path / "model", command)
    peers.run_round([row], REQUEST, seconds=60)
    assert row.reason == "no model: ValueError: unknown architecture"
    assert not row.model.exists()
    assert "unknown architecture" in (tmp_path / "model.log").read_text()


def test_the_rows_are_ours_and_the_neighbours(peers: Any, tmp_path: Path) -> None:
    rows = peers.rows_of(peers.parse(["--folder", str(tmp_path), "--keep", "25%", "--torch"]))
    assert [row.script for row in rows].count("ours.py") == 2
    assert "25%" in rows[0].make
    assert all((peers.RUNS / row.script).exists() for row in rows)
    assert len({row.name for row in rows}) == len(rows) == 6


def test_the_tokenizer_has_the_released_special_ids_and_text_for_every_id(peers: Any, tmp_path: Path) -> None:
    from parts.peer_files import QUESTION, num_text_tokens, write_tokenizer
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(f"<|im_start|>{QUESTION}<|image_pad|>").ids
    assert (ids[0], ids[-1]) == (151644, 151655)
    assert tokenizer.decode(ids) == QUESTION
    assert tokenizer.decode([150000]) == "w150000"
    assert num_text_tokens(tmp_path) == len(ids) - 2 + 10  # <|im_start|>user\n<|vision_start|> … \n


@pytest.mark.parametrize(
    ("used", "found"),
    [([0.0, 9e9, 0.0, 0.0], 2), ([0.0, 9e9, 0.0, 8e9], 2)],
    ids=["quiet", "least disturbed"],
)
def test_a_measurement_is_repeated_while_other_programs_run(
    peers: Any, monkeypatch: pytest.MonkeyPatch, used: list[float], found: int
) -> None:
    seconds, runs = iter(used), iter([1, 2])
    monkeypatch.setattr(peers, "_seconds_of_others", lambda: next(seconds))
    assert peers.undisturbed(lambda: next(runs), others=0.1, tries=2) == found


def test_without_a_share_a_measurement_runs_once(peers: Any) -> None:
    assert peers.undisturbed(iter([1, 2]).__next__, others=None) == 1
