"""The examples of the pages about the server give the answers that they promise."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.bundles import export
from tests.schedules import schedule_for
from tests.serving.server import RunningServer, running
from trio_edge.runtime.pipeline import Pipeline
from trio_edge.serving.cli import command

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGES = ("serving.md", "serving-operation.md")
TEXT = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in PAGES)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def tiny() -> Iterator[RunningServer]:
    """Serves the packaged model as the document does."""
    stages = schedule_for(1 / 9, num_layers=16, num_visual=192)
    bundles = {
        "tiny": export("tiny", dtype="float32", schedule=stages),
        "tiny-all": export("tiny", dtype="float32"),
    }
    with running({name: partial(Pipeline.from_bundle, path) for name, path in bundles.items()}) as server:
        yield server


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl; runs in CI")
def test_the_curl_examples_answer(tiny: RunningServer) -> None:
    script = "\n".join(block for block in blocks("bash") if "curl" in block)
    commands = re.split(r"\n(?=curl )", script.replace("localhost:8000", f"localhost:{tiny.port}").strip())
    answers = []
    for line in commands:
        result = subprocess.run(
            ["bash", "-ec", line], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        answers.append(result.stdout)
    models, where, choice, decision, ready, metrics = answers
    assert [model["id"] for model in json.loads(models)["data"]] == ["tiny", "tiny-all"]
    answer = json.loads(where)
    assert answer["choices"][0]["message"]["content"] == "northeast"
    assert (
        len(answer["usage"]["kept_tokens"]) == 3
    )  # of another schedule of 11.1 %, which other tests export too
    for name in ("prompt_tokens", "completion_tokens", "visual_tokens"):
        assert f'"{name}": {answer["usage"][name]}' in TEXT
    assert json.loads(choice)["choices"][0]["message"]["content"] in ("yes", "no")
    predicate, color = json.loads(decision)["answers"]
    assert predicate["name"] == "triangle"
    assert predicate["probability"] > 0.5
    assert color["choice"] == "green"
    assert json.loads(ready)["status"] == "ready"
    named = re.findall(r"`(trio_\w+)`", TEXT)
    assert named
    assert [name for name in named if name.removesuffix("_total") not in metrics] == []


def test_the_python_examples_answer(tiny: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = "\n".join(blocks("python")).replace("localhost:8000", f"localhost:{tiny.port}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == "northeastnortheast\ngreen\ngreen True\n"


def test_every_option_that_is_named_exists() -> None:
    known = {option for parameter in command.params for option in parameter.opts}
    named = set(re.findall(r"`(--[\w-]+)", TEXT))
    assert named <= known
    limits = dict(re.findall(r"`(--max-\w+|--shutdown-timeout) (\d+)`", TEXT))
    defaults = {parameter.opts[0]: parameter.default for parameter in command.params}
    assert {name: int(value) for name, value in limits.items()} == {name: defaults[name] for name in limits}
    assert len(limits) == 5
