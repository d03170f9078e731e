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
from trio_edge.runtime.cli.build import main as trio_build
from trio_edge.runtime.cli.console import backend_options, run
from trio_edge.runtime.cli.tables import whole_table, wide_console
from trio_edge.runtime.engines.files import engine_sets
from trio_edge.runtime.engines.package import ENGINE_BACKENDS

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH = click.Path(path_type=Path)
TABLES = Path(__file__).with_name("tables.json")
SCHEMA_VERSION = 1
_UNITS = {"first_tokens_s": 1.0, "total_s": 1.0, "flops": 1e12, "kv_bytes": 2**20, "processed_tokens": 1.0}
"""Costs that are printed, and the size of their unit."""


class TableRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
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
    rows: list[TableRow]


class PublishedTables(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of ``tables.json``."""

    benchmarks: dict[str, Benchmark]
    models: dict[str, TableModel]
    tables: dict[str, PublishedTable]


@dataclass(frozen=True)
class Cell:
    """One row of a table on one benchmark."""

    row: TableRow
    name: str
    """The benchmark's name."""
    benchmark: Benchmark
    model: TableModel
    checkpoint: str
    work: Path
    tasks: Path
    """Folder of tasks besides lmms-eval's own."""
    limit: int | None
    backend: dict[str, Any]
    """Its name and threads."""

    @property
    def bundle(self) -> Path:
        """Folder of the row's bundle; tables of one model share it."""
        name = f"{Path(self.checkpoint).name} {self.row.name}"
        return self.work / re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")

    @property
    def out(self) -> Path:
        """Folder of the harness's results."""
        parts = self.bundle.name, self.name, self.backend["backend"], str(self.limit or "all")
        return self.bundle.with_name("--".join(parts))

    @property
    def commands(self) -> list[list[str]]:
        """The export, the build if the backend has engines, and the run of lmms-eval."""
        bundle, name = str(self.bundle), self.backend["backend"]
        model = {"pretrained": bundle, "report": self.out / "costs.json", **self.backend}
        if self.model.system:
            model["system"] = f'"{self.model.system}"'
        arguments = ",".join(f"{key}={value}" for key, value in model.items())
        harness = [sys.executable, "-m", "lmms_eval", "--model", "trio_edge", "--model_args", arguments]
        harness += ["--tasks", self.benchmark.task, "--include_path", str(self.tasks), "--batch_size", "1"]
        harness += ["--output_path", str(self.out)] + ["--limit", str(self.limit)] * (self.limit is not None)
        export = ["trio-export", self.checkpoint, *self.model.export, *self.row.export, "--out", bundle]
        build = [["trio-build", bundle, "--backend", name]] if name in ENGINE_BACKENDS else []
        return [export, *build, harness]

    def results(self) -> list[Path]:
        """Return the harness's files of results."""
        return list(self.out.rglob("*results.json"))

    def run(self) -> dict[str, Any]:
        """Run what an earlier run has not, and return ours and the published numbers; raise DataError if a command fails."""
        export, *build, harness = self.commands
        where = f"{self.row.name}, {self.name}"
        if not self.bundle.exists() and trio_export([*export[1:], "--quiet"]):
            raise DataError(f"{where}: expected an export, got the error above; correct it")
        built = {engines.backend for engines in engine_sets(self.bundle).values()}
        if build and self.backend["backend"] not in built and trio_build(build[0][1:]):
            raise DataError(f"{where}: expected engines, got the error above; correct it")
        self.out.mkdir(exist_ok=True)
        code = 0 if self.results() else subprocess.run(harness, check=False).returncode
        if code or not self.results():
            raise DataError(f"{where}: expected results of lmms-eval, got none, code {code}; see above")
        scores = json.loads(max(self.results()).read_bytes())["results"][self.benchmark.task]
        score = self.benchmark.scale * sum(scores[f"{metric},none"] for metric in self.benchmark.metrics)
        found = {"row": self.row.name, "benchmark": self.name, "limit": self.limit, "score": score}
        costs = json.loads((self.out / "costs.json").read_bytes())
        return {**found, **costs, "published": self.row.published}


@click.command("trio-reproduce", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("table", required=False)
@click.option(
    "--list", "as_list", is_flag=True, help="Print all tables with their rows and sources, and exit."
)
@click.option("--dry-run", is_flag=True, help="Print all commands and run nothing.")
@click.option("--row", "rows", multiple=True, help="Only this row. Repeatable. [default: all]")
@click.option("--benchmark", "names", multiple=True, help="Only this benchmark. Repeatable. [default: all]")
@click.option("--limit", type=click.IntRange(1), help="Questions per benchmark. [default: all]")
@click.option("--model", help="Checkpoint folder in place of the table's model.")
@click.option("--work", type=PATH, help="Folder for bundles and results. [default: TABLE]")
@click.option(
    "--tables", type=PATH, default=TABLES, help="File of other tables; tasks of lmms-eval may lie next to it."
)
@click.option("--json", "json_file", type=PATH, help="Write the results to this JSON file.")
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
        names = ", ".join(known.tables)
        raise DataError(f"TABLE: expected one of {names}, got {table or 'none'}; see --list")
    settings["work"] = settings["work"] or Path(table)
    cells = _cells(known, known.tables[table], tasks=tables.parent, **settings)
    if dry_run:
        print("\n".join(dict.fromkeys(shlex.join(text) for cell in cells for text in cell.commands)))
        return 0
    if find_spec("lmms_eval") is None:
        raise DataError("lmms-eval: expected it to be installed, it is not; run pip install lmms-eval")
    if json_file is not None:
        check_outputs({"--json": json_file})
    report = {"schema_version": SCHEMA_VERSION, "table": table, "source": known.tables[table].source}
    report |= {"backend": settings["backend"], **machine_facts(), "results": [cell.run() for cell in cells]}
    if json_file is not None:
        write_output("--json", json_file, json.dumps(report, indent=1).encode())
    _print_results(report)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(command, argv)


def _cells(
    known: PublishedTables,
    table: PublishedTable,
    *,
    rows: Sequence[str],
    names: Sequence[str],
    **settings: Any,
) -> list[Cell]:
    """Return the chosen cells, row by row."""
    of_table = [row.name for row in table.rows]
    for option, given, there in (("--row", rows, of_table), ("--benchmark", names, table.benchmarks)):
        if odd := [name for name in given if name not in there]:
            raise DataError(f"{option}: expected some of {', '.join(there)}, got {odd[0]}; choose among them")
    model, checkpoint = known.models[table.model], settings.pop("model") or table.model
    place = {name: settings.pop(name) for name in ("work", "tasks", "limit")}
    return [
        Cell(row, name, known.benchmarks[name], model, checkpoint, backend=settings, **place)
        for row in table.rows
        for name in names or table.benchmarks
        if row.name in (rows or of_table)
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
