"""The README and the documents point at things that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trio_edge.export.cli import command as export_command
from trio_edge.runtime.cli.run import command as run_command

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_to_a_file_works(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


def test_every_file_named_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:examples|benchmarks|tests|docs)/[\w./-]+\w", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_flag_in_the_readmes_commands_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, command in (("trio-export", export_command), ("trio-run", run_command)):
        known = {option for parameter in command.params for option in parameter.opts}
        used = {
            flag
            for line in re.findall(rf"^{name} .*$", text, re.MULTILINE)
            for flag in re.findall(r"--[\w-]+", line)
        }
        assert used <= known


def test_the_python_example_in_the_readme_compiles() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
