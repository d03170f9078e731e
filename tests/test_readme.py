"""The README and the documents: links point at things that exist, commands exist, and printed output is what a command prints.

``console`` blocks are run and their output is compared, "…" standing for anything. One that cannot be run has a comment before it
that says why. ``bash`` blocks need a released checkpoint, a device or hours: their commands and options must exist. A table after
the comment ``printed by: python SCRIPT OPTIONS`` is compared with what the script prints: a page may choose its rows and columns.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import re
import runpy
import shlex
import sys
from typing import TYPE_CHECKING, NamedTuple

import click
import pytest

from tests.documents import DOCUMENTS, PAGES, ROOT, Block, blocks, commands, printed_rows, tables
from tests.shared_traces import shared_traces

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EACH_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
ENTRY_POINTS = {
    point.name: point
    for point in importlib.metadata.entry_points(group="console_scripts")
    if point.name.startswith("trio-")
}


def _options(name: str) -> set[str]:
    module = importlib.import_module(ENTRY_POINTS[name].module)
    command: click.Command = module.command
    return {option for parameter in command.params for option in parameter.opts} | {"--help"}


ALL_OPTIONS = set().union(*map(_options, ENTRY_POINTS))


@EACH_DOCUMENT
def test_every_link_to_a_file_works(document: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@EACH_DOCUMENT
def test_no_page_is_longer_than_150_lines(document: Path) -> None:
    assert document.read_text(encoding="utf-8").count("\n") <= 150


def test_every_page_is_in_the_site_and_in_the_index() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [str(path.relative_to(ROOT / "docs")) for path in PAGES]
    assert [page for page in pages if f" {page}\n" not in nav] == []
    assert [page for page in pages if f"(docs/{page}" not in index] == []


def test_every_file_named_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:examples|benchmarks|tests|docs)/[\w./-]+\w", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@EACH_DOCUMENT
def test_every_command_and_option_exists(document: Path) -> None:
    wrong = [problem for command in commands(document) for problem in _problems(command)]
    assert wrong == []


def _problems(command: list[str]) -> list[str]:
    """Return what a command of the documents names and nobody has."""
    name, *arguments = command
    flags = {argument.partition("=")[0] for argument in arguments if re.match(r"--[a-z]", argument)}
    if name in ENTRY_POINTS:
        return [f"{name} {flag}" for flag in sorted(flags - _options(name))]
    if name.startswith("trio-"):
        return [name]
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return [
            f"make {word}" for word in arguments if re.fullmatch(r"[a-z-]+", word) and word not in targets
        ]
    if name == "pip":
        return [
            f"pip {extra}" for word in arguments for extra in _extras(word) if extra not in _known_extras()
        ]
    return _problems_of_script(arguments[0], flags)


def _problems_of_script(script: str, flags: set[str]) -> list[str]:
    """A script of the repository names its options itself or in the parts it shares; export_scale.py passes some on."""
    if not (ROOT / script).is_file():
        return [script]
    sources = [ROOT / script, *(ROOT / "benchmarks").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    known = ALL_OPTIONS if "--export" in flags or "--calibrate" in flags else set()
    return [f"{script} {flag}" for flag in sorted(flags - known) if f'"{flag}"' not in text]


def _extras(word: str) -> list[str]:
    found = re.fullmatch(r"(?:\.|trio-edge|\S*trio_edge\S*\.whl)\[([\w,-]+)\]", word)
    return found[1].split(",") if found else []


def _known_extras() -> set[str]:
    text = (
        (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")[2]
    )
    return set(re.findall(r"^([\w-]+) = \[", text.partition("\n[")[0], re.MULTILINE))


@EACH_DOCUMENT
def test_every_code_block_is_read(document: Path) -> None:
    fences = re.findall(r"^```", document.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(fences) == 2 * len(blocks(document))


def test_a_command_with_an_unknown_option_is_found() -> None:
    assert _problems(["trio-run", "bundle", "--imge"]) == ["trio-run --imge"]
    assert _problems(["trio-walk"]) == ["trio-walk"]
    assert _problems(["python", "benchmarks/none.py"]) == ["benchmarks/none.py"]
    assert _problems(["pip", "install", ".[none]"]) == ["pip none"]
    assert _problems(["make", "tea"]) == ["make tea"]


class Run(NamedTuple):
    """One command of a ``console`` block and what the document says it prints."""

    arguments: list[str]
    output: str


def _runs(block: Block) -> list[Run]:
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    lines = [part.partition("\n") for part in parts]
    return [Run(shlex.split(command), output) for command, _, output in lines]


RUNNABLE = [path for path in DOCUMENTS if any(block.is_run for block in blocks(path))]


@pytest.mark.parametrize("document", RUNNABLE, ids=lambda path: path.name)
def test_commands_print_what_the_document_says(
    document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for run in [run for block in blocks(document) if block.is_run for run in _runs(block)]:
        assert _main(run.arguments[0])(run.arguments[1:]) == 0
        printed = capsys.readouterr().out
        assert re.fullmatch(_pattern(run.output), printed), f"{run.arguments}\n{printed}"


def _main(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = ENTRY_POINTS[name].load()

    def export(arguments: list[str]) -> int:
        with shared_traces():
            return main(arguments)

    return export if name == "trio-export" else main


def _pattern(output: str) -> str:
    lines = output.rstrip("\n").split("\n")
    return "".join(r"(?:.*\n)*?" if line == "…" else re.escape(line) + r" *\n" for line in lines)


def _stale_rows(document: Path) -> list[list[str]]:
    """Return the rows of a document's tables that their scripts, run in this process, do not print."""
    stale = []
    for table in tables(document):
        script, printed = ROOT / table.arguments[0], io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(sys, "argv", table.arguments)
            patch.syspath_prepend(script.parent)
            with contextlib.suppress(SystemExit):  # a script that fails does not print the rows
                runpy.run_path(str(script), run_name="__main__")
        found = printed_rows(printed.getvalue())
        stale += [list(row) for row in table.rows if not any(row <= other for other in found)]
    return stale


def test_tables_have_the_rows_that_their_scripts_print() -> None:
    assert {str(path): rows for path in DOCUMENTS if (rows := _stale_rows(path))} == {}


def test_a_row_that_its_script_does_not_print_is_found(tmp_path: Path) -> None:
    script, page = tmp_path / "script.py", tmp_path / "page.md"
    script.write_text("print('| a | b | c |\\n|---|---|---|\\n| x | 1.5 | 2 |\\n| y | 2.5 | 3 |')")
    table = "| name | c | b |\n|---|---|---|\n| **x** | 2 | 1.5 |\n| y | 3 | {} |\n"
    marked = f"<!-- printed by: python {script} -->\n"
    for value, stale in (("2.5", []), ("2.6", [["y", "3", "2.6"]])):
        page.write_text("Text\n\n" + marked + table.format(value))
        assert _stale_rows(page) == stale


def test_python_examples_compile() -> None:
    found = [block for path in DOCUMENTS for block in blocks(path) if block.language == "python"]
    assert found
    for block in found:
        compile(block.text, str(block.document), "exec")
