"""Reads the documents: their pages, code blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
"""The pages of the site, next to README.md."""
OTHERS = sorted((ROOT / "contributing").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *OTHERS]
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```", re.M | re.S
)
_TABLE = re.compile(r"^<!-- printed by: python (?P<arguments>.+) -->\n\n?(?P<text>(?:\|.*\n)+)", re.M)
_COMMAND = re.compile(r"(?:^|[;|&]\s*|\bdo\s+|^\$ )((?:trio-\w+|python \S+\.py|pip|make)\b[^;|&]*)")


class Block(NamedTuple):
    """A code block of a document."""

    document: Path
    language: str
    text: str
    reason: str | None
    """Why its commands are not run, if they are not."""

    @property
    def is_run(self) -> bool:
        """Whether the tests run its commands."""
        return self.language == "console" and self.reason is None


def blocks(document: Path) -> list[Block]:
    """Return the code blocks of a document in their order."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, found["language"], found["text"], found["reason"]) for found in _BLOCK.finditer(text)
    ]


class Table(NamedTuple):
    """A table whose rows a script prints, as the comment before it says."""

    arguments: list[str]
    """The script and its options."""
    rows: list[Counter[str]]
    """The cells of each row below the header, without bold type."""


def tables(document: Path) -> list[Table]:
    """Return the tables of a document that have such a comment."""
    text = document.read_text(encoding="utf-8")
    return [
        Table(shlex.split(found["arguments"]), printed_rows(found["text"])[1:])
        for found in _TABLE.finditer(text)
    ]


def printed_rows(text: str) -> list[Counter[str]]:
    """Return the cells of each row of all Markdown tables in a text, headers included."""
    lines = [line.replace("**", "") for line in text.splitlines() if re.match(r"\|(?!-)", line)]
    return [Counter(cell.strip() for cell in line.strip().strip("|").split("|")) for line in lines]


def commands(document: Path) -> Iterator[list[str]]:
    """Yield the words of each command of ours in the document's shell blocks, loops and pipes taken apart."""
    for block in blocks(document):
        if block.language not in ("bash", "console"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for found in _COMMAND.finditer(line.partition(" #")[0].removeprefix("$ ")):
                yield shlex.split(found[1])
