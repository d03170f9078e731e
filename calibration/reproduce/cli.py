"""``trio-reproduce TABLE``: a published table once more, through lmms-eval, with the published numbers next to ours.

``tables.json`` holds the tables: models with their exports and prompts, rows with the numbers that papers give, and benchmarks
as tasks of lmms-eval. Each row becomes a bundle; each row and benchmark one run of the harness.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from trio_edge.export.cli import main as trio_export
from trio_edge.profiling.check.cli import machine_facts
from trio_edge.runtime.bundle.errors import DataError
from trio_edge.runtime.bundle.files import check_outputs, write_output
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.runtime.cli.tables import whole_table, wide_console

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).parent
SCHEMA_VERSION = 1
_UNITS = {"first_tokens_s": 1.0, "total_s": 1.0, "flops": 1e12, "kv_bytes": 2**20, "processed_tokens": 1.0}
"""Costs that are printed, and the size of their unit."""


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One row: the export that repeats it, and the published numbers by benchmark or cost."""

    name: str
    export: list[str]
    published: dict[str, float]
    note: str = ""


class Benchmark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task of lmms-eval; the sum of its metrics times ``scale`` is the number of a table."""

    task: str
    metrics: list[str]
    scale: float = 100.0
    note: str = ""


class TableModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of all exports of a model, and its system prompt."""

    export: list[str]
    system: str = ""
    note: str = ""


class PublishedTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a paper."""

    title: str
    source: str
    model: str
    benchmarks: list[str]
    rows: list[Row]


class PublishedTables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``tables.json``."""

    benchmarks: dict[str, Benchmark]
    models: dict[str, TableModel]
    tables: dict[str, PublishedTable]


@dataclass(frozen=True)
class Cell:
    """One row of a table on one benchmark."""

    row: Row
    name: str
    """Of the benchmark."""
    benchmark: Benchmark
    model: TableModel
    checkpoint: str
    work: Path
    settings: dict[str, Any]
    """``limit``, ``backend``, ``threads`` and ``include_path``."""

    @property
    def bundle(self) -> Path:
        """Folder of the row's bundle."""
        return self.work / re.sub(r"[^a-z0-9.]+", "-", self.row.name.lower())

    @property
    def out(self) -> Path:
        """Folder of the harness's results."""
        return self.bundle.with_name(f"{self.bundle.name}--{self.name}--{self.settings['limit'] or 'all'}")

    @property
    def export(self) -> list[str]:
        """Arguments of trio-export."""
        return [self.checkpoint, *self.model.export, *self.row.export, "--out", str(self.bundle)]

    @property
    def harness(self) -> list[str]:
        """The command that runs lmms-eval."""
        model = {"pretrained": self.bundle, "report": self.out / "costs.json"}
        model |= {name: self.settings[name] for name in ("backend", "threads")}
        model |= {"system": f'"{self.model.system}"'} if self.model.system else {}
        arguments = ",".join(f"{name}={value}" for name, value in model.items())
        command = [sys.executable, "-m", "lmms_eval", "--model", "trio_edge", "--model_args", arguments]
        command += ["--tasks", self.benchmark.task, "--include_path", str(self.settings["include_path"])]
        limit = self.settings["limit"]
        command += ["--batch_size", "1", "--output_path", str(self.out)]
        return command if limit is None else [*command, "--limit", str(limit)]

    def run(self) -> None:
        """Export the bundle and run the harness, unless an earlier run has done so; raise DataError if one fails."""
        if not self.bundle.exists() and trio_export([*self.export, "--quiet"]):
            raise DataError(f"{self.row.name}: expected an export, got the error above; correct it")
        if not (self.out / "costs.json").exists():
            self.out.mkdir(parents=True, exist_ok=True)
            if code := subprocess.run(self.harness, check=False).returncode:
                raise DataError(
                    f"{self.row.name}, {self.name}: expected lmms-eval to end well, got code {code}; its message is above"
                )

    def result(self) -> dict[str, Any]:
        """Return ours and the published numbers."""
        scores = json.loads(max(self.out.rglob("*results.json")).read_bytes())["results"][self.benchmark.task]
        ours = self.benchmark.scale * sum(scores[f"{metric},none"] for metric in self.benchmark.metrics)
        costs = json.loads((self.out / "costs.json").read_bytes())
        found = {"row": self.row.name, "benchmark": self.name, "task": self.benchmark.task}
        return {
            **found,
            "limit": self.settings["limit"],
            "score": ours,
            **costs,
            "published": self.row.published,
        }


@click.command("trio-reproduce", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("table", required=False)
@click.option(
    "--list", "as_list", is_flag=True, help="Print the tables with their rows and sources, and exit."
)
@click.option("--dry-run", is_flag=True, help="Print all commands and run nothing.")
@click.option("--row", "rows", multiple=True, help="Only this row. Repeatable. [default: all]")
@click.option("--benchmark", "names", multiple=True, help="Only this benchmark. Repeatable. [default: all]")
@click.option("--limit", type=click.IntRange(1), help="Questions per benchmark. [default: all]")
@click.option("--model", help="Checkpoint folder in place of the table's model.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Folder for bundles and results. [default: TABLE]"
)
@click.option(
    "--tables", type=click.Path(path_type=Path), default=HERE / "tables.json", help="File of other tables."
)
@click.option(
    "--include-path", type=click.Path(path_type=Path), default=HERE / "tasks", help="Folder of further tasks."
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the results to this JSON file."
)
@backend_options()
def command(
    table: str | None, as_list: bool, dry_run: bool, tables: Path, json_file: Path | None, **settings: Any
) -> int:
    """Run the published TABLE and print ours next to its numbers.

    Exports a bundle for each row and runs lmms-eval on it; an interrupted run continues from its folder.
    """
    try:
        known = msgspec.json.decode(tables.read_bytes(), type=PublishedTables)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"--tables {tables}: expected a file of tables, got: {error}; check it") from None
    if as_list:
        _print_tables(known)
        return 0
    if table not in known.tables:
        raise DataError(
            f"TABLE: expected one of {', '.join(known.tables)}, got {table or 'none'}; see --list"
        )
    cells = _cells(known, known.tables[table], work=settings.pop("work") or Path(table), **settings)
    if dry_run:
        lines = [
            text
            for cell in cells
            for text in (shlex.join(["trio-export", *cell.export]), shlex.join(cell.harness))
        ]
        print("\n".join(dict.fromkeys(lines)))
        return 0
    if find_spec("lmms_eval") is None:
        raise DataError("lmms-eval: expected it to be installed, it is not; run pip install lmms-eval")
    if json_file is not None:
        check_outputs({"--json": json_file})
    for cell in cells:
        cell.run()
    report = {"schema_version": SCHEMA_VERSION, "table": table, **machine_facts()}
    report |= {"source": known.tables[table].source, "results": [cell.result() for cell in cells]}
    if json_file is not None:
        write_output("--json", json_file, json.dumps(report, indent=1).encode())
    _print_results(report)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _cells(
    known: PublishedTables, table: PublishedTable, *, rows: Sequence[str], names: Sequence[str], model: str | None,
    work: Path, **settings: Any,
) -> list[Cell]:  # fmt: skip
    """Return the chosen cells, benchmark by benchmark within a row."""
    of_rows = {row.name: row for row in table.rows}
    for option, given, there in (("--row", rows, of_rows), ("--benchmark", names, table.benchmarks)):
        if odd := [name for name in given if name not in there]:
            raise DataError(f"{option}: expected some of {', '.join(there)}, got {odd[0]}; choose among them")
    return [
        Cell(
            row, name, known.benchmarks[name], known.models[table.model], model or table.model, work, settings
        )
        for row in table.rows
        if not rows or row.name in rows
        for name in names or table.benchmarks
    ]


def _print_tables(known: PublishedTables) -> None:
    for name, table in known.tables.items():
        print(f"{name}: {table.title}\n  {table.source}")
        notes = {row.name: row.note for row in table.rows} | {table.model: known.models[table.model].note}
        notes |= {one: known.benchmarks[one].note for one in table.benchmarks}
        for one, note in notes.items():
            print(f"  {one}{f' ({note})' if note else ''}")


def _print_results(report: dict[str, Any]) -> None:
    """Print a line for each cell; every number stands before the published one."""
    headers = ("score", "to first tokens s", "in all s", "TFLOPs", "KV MiB", "tokens kept on average")
    table = whole_table("row", "benchmark", "answers", *headers)
    for one in report["results"]:
        published = one["published"]
        pairs = [(one["score"], published.get(one["benchmark"]), 1.0)]
        pairs += [(one[name], published.get(name), unit) for name, unit in _UNITS.items()]
        numbers = (
            f"{ours / unit:.4g} / {'-' if theirs is None else f'{theirs / unit:.4g}'}"
            for ours, theirs, unit in pairs
        )
        table.add_row(one["row"], one["benchmark"], str(one["answers"]), *numbers)
    wide_console().print(table)
    print(f"ours / published; {report['source']}")
