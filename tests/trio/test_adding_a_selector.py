"""docs/adding-a-selector.md, followed word for word in a copy of the tree: files, rows and tests."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared_folder import with_more_traces

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding-a-selector.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))
ROWS = re.findall(r"<!-- row -->\n```python\n(.*?)```", PAGE, re.DOTALL)
FOLDERS = ("trio", "export", "runtime", "profiling", "calibration", "serving")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A tree in which ``trio`` and its tests may be changed."""
    for name in ("trio", "tests/trio"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for source in [ROOT / "pyproject.toml", *(ROOT / name for name in FOLDERS), *(ROOT / "tests").iterdir()]:
        place = tmp_path / source.relative_to(ROOT)
        if not place.exists():
            place.symlink_to(source)
    (tmp_path / "trio_edge").mkdir()
    shutil.copy(ROOT / "trio_edge" / "__init__.py", tmp_path / "trio_edge")
    for name in FOLDERS:
        (tmp_path / "trio_edge" / name).symlink_to(tmp_path / name)
    return tmp_path


def test_the_page_followed_word_for_word_gives_two_selectors_that_export(copy: Path) -> None:
    for name, text in FILES.items():
        assert f"ile `{name}`:" in PAGE
        (copy / name).write_text(text, encoding="utf-8")
    registry = (copy / "trio" / "methods.py").read_text(encoding="utf-8")
    before, end, after = registry.partition("\n)\nSTAGE_METHODS")
    rows = ",\n".join(row.rstrip() for row in ROWS)
    (copy / "trio" / "methods.py").write_text(f"{before}\n{rows},{end}{after}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/trio/test_methods.py", "-k", "norm or first",
         *(name for name in FILES if name.startswith("tests/"))],
        cwd=copy, env={**with_more_traces(), "PYTHONPATH": str(copy)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout  # for each: its own test, the export and the check for its test


def test_the_package_of_the_page_is_the_example() -> None:
    example = ROOT / "examples" / "selector_package"
    assert (example / "norm_selector" / "norm.py").read_text("utf-8") == FILES[
        "trio/selectors/stages/norm.py"
    ]
    (entry_point,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert entry_point in (example / "pyproject.toml").read_text("utf-8")
    row = (example / "norm_selector" / "__init__.py").read_text("utf-8").partition(" = ")[2].rstrip()
    assert row.replace("norm_selector.norm:", "trio_edge.trio.selectors.stages.norm:") == ROWS[0].rstrip()
