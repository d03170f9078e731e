"""The lines that docs/troubleshooting.md explains are lines that the product prints."""

from __future__ import annotations

import re

import pytest

from tests.documents import ROOT

FOLDERS = ("calibration", "export", "profiling", "runtime", "serving", "trio")
JOINED = re.compile(r'"\s*\n\s*(?:\(|f?")')
"""The end of a literal whose message continues in the next one."""
VALUE = re.compile(r"\b[A-Z]+\b|\b\d\.X\b|…|'[^']*'|\b\d+\b|\([^)]*\)|float16|torch|trio\.json")
"""A value in a quoted message."""


def _quoted() -> list[str]:
    rows = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    first_cells = [row.split(" | ")[0] for row in rows if row.startswith("| ") and not row.startswith("|---")]
    spans = [span for cell in first_cells for span in re.findall(r"`([^`]+)`", cell)]
    return [span for span in spans if re.search(r"expected|cannot|never|full|got|download|stages", span)]


@pytest.fixture(scope="module")
def messages() -> str:
    """All sources, with messages that go over several lines in one."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return JOINED.sub("", "\n".join(path.read_text(encoding="utf-8") for path in files))


@pytest.mark.parametrize("line", _quoted())
def test_the_product_prints_the_line(line: str, messages: str) -> None:
    longest = max((part.strip(" ,:") for part in VALUE.split(line)), key=len)
    assert len(longest) > 5
    assert longest in messages
