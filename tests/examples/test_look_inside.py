"""The notebook runs from top to bottom, and what is committed is a complete run of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import pytest

from tests.shared_traces import shared_traces
from trio_edge.export import cli as export_cli

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTEBOOK = Path(__file__).parents[2] / "examples" / "look_inside.ipynb"
export = export_cli.main


def _cells() -> list[Any]:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def _export_with_shared_traces(arguments: Sequence[str]) -> int:
    """The command itself, in which only graphs that a test run has traced already are not traced again."""
    with shared_traces():
        return export(arguments)


def test_the_notebook_runs_and_its_answers_are_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a kernel would trace each graph again."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shown: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: (shown.append(len(plt.gcf().axes)), plt.close("all")))
    monkeypatch.setattr(export_cli, "main", _export_with_shared_traces)
    monkeypatch.chdir(NOTEBOOK.parent)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(_cells()):
        exec(compile(cell.source, f"look_inside cell {number}", "exec"), names)
    assert shown == [1, 1, 2]
    assert set(names["answers"].values()) == {"northeast"}
    assert "where is the diamond ? -> northeast" in capsys.readouterr().out
    assert len(names["runs"]) == 7
    accuracies = {
        (run["run"]["label"], run["run"]["selection"]): run["accuracy"]["value"] for run in names["runs"]
    }
    assert len(accuracies) == 7
    assert max(accuracies.values()) > 0.8


def test_the_committed_notebook_has_outputs_without_errors_below_300_kilobytes() -> None:
    outputs = [output for cell in _cells() for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert not [output for output in outputs if output.output_type == "error"]
    assert NOTEBOOK.stat().st_size < 300_000
    assert str(Path.home()) not in NOTEBOOK.read_text(encoding="utf-8")
