"""Every command with every broken stream: one plain line and exit code 2, a quiet end, or the same answer."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pictures import random_picture

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full; runs on Linux")
COMMANDS = (
    "trio-run", "trio-inspect", "trio-inspect --json", "trio-build", "trio-profile", "trio-eval", "trio-export",
    "trio-calibrate", "trio-check", "an error",
)  # fmt: skip
STREAMS: dict[str, dict[str, str]] = {
    "healthy": {},
    "no stdout": {"stdout": "closed"},
    "no stderr": {"stderr": "closed"},
    "neither": {"stdout": "closed", "stderr": "closed"},
    "full stdout": {"stdout": "full"},
    "full stderr": {"stderr": "full"},
    "both full": {"stdout": "full", "stderr": "full"},
    "stdout without a reader": {"stdout": "gone"},
    "stderr without a reader": {"stderr": "gone"},
    "both without a reader": {"stdout": "gone", "stderr": "gone"},
    "stdout that cannot be written": {"stdout": "read only"},
}


@pytest.fixture(scope="module")
def results(
    reduced_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("streams")
    bundle, image = str(reduced_bundle), folder / "image.png"
    random_picture(48, 48).save(image)
    (folder / "data.jsonl").write_text(
        json.dumps({"image": str(image), "question": "w1", "answer": "w2"}) + "\n"
    )
    asked = ["--image", str(image), "--prompt", "w1", "--threads", "1", "--max-new-tokens", "3"]
    lines: dict[str, tuple[str, list[str]]] = {
        "trio-run": ("runtime.cli.run", [bundle, *asked]),
        "trio-inspect": ("runtime.cli.inspect", [bundle]),
        "trio-inspect --json": ("runtime.cli.inspect", [bundle, "--json"]),
        "trio-build": ("runtime.cli.build", ["--help"]),
        "trio-profile": ("profiling.cli", ["--predict", "orin-nx-16", "--model", "llava-1.5-7b"]),
        "trio-eval": (
            "calibration.evaluate.cli", [bundle, "--data", str(folder / "data.jsonl"), "--answer-tokens", "2"]
        ),
        "trio-export": ("export.cli", ["--help"]),
        "trio-calibrate": ("calibration.search.cli", ["--help"]),
        "trio-check": ("profiling.check.cli", ["--help"]),
        "an error": ("runtime.cli.run", [str(folder / "none"), *asked]),
    }  # fmt: skip
    pairs = list(itertools.product(COMMANDS, STREAMS))
    cases = [
        {
            "main": f"trio_edge.{lines[command][0]}",
            "arguments": lines[command][1],
            "streams": STREAMS[streams],
        }
        for command, streams in pairs
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).with_name("broken_streams.py")
    subprocess.run([sys.executable, script, folder / "cases.json", folder / "results.json"], check=True)
    return dict(zip(pairs, json.loads((folder / "results.json").read_bytes()), strict=True))


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_stream_is_one_line_or_changes_nothing(
    command: str, streams: str, results: dict[tuple[str, str], dict[str, Any]]
) -> None:
    healthy, got = results[command, "healthy"], results[command, streams]
    broken = STREAMS[streams]
    assert healthy["code"] == (2 if command == "an error" else 0)
    assert "Traceback" not in got["stderr"]
    assert "Exception ignored" not in got["stderr"]
    if broken.get("stdout") is None or (command == "an error" and broken["stdout"] != "closed"):
        assert got["code"] == healthy["code"]
        if command not in ("trio-eval", "trio-run"):  # which print times
            assert got["stdout"] == healthy["stdout"]
    elif broken["stdout"] == "gone":
        assert got["code"] == 1
        assert got["stderr"].count("\n") <= healthy["stderr"].count("\n")
    else:
        assert got["code"] == 2
        if not broken.get("stderr"):
            last = got["stderr"].splitlines()[-1]
            assert last.startswith("trio-") and (
                "standard output: expected" in last or "room for the output" in last
            )
