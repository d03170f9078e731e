"""trio-reproduce: every published row is an export that fits its model, and results stand next to the published numbers."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from tests.bundles import export
from tests.calibration.question_files import questions_about, write_questions
from tests.calibration.test_lmms_eval_model import FUNCTIONS, TASK
from trio_edge.calibration.reproduce import cli
from trio_edge.calibration.reproduce.cli import TABLES, PublishedTables, main
from trio_edge.export.cli import options_from
from trio_edge.profiling.predict.models import MODELS
from trio_edge.runtime.bundle.schedule import Schedule, Stage
from trio_edge.runtime.prompts.chat import VICUNA_TEMPLATE, render_chat
from trio_edge.trio.budgets import ScheduleRequest

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = msgspec.json.decode(TABLES.read_bytes(), type=PublishedTables)
ROWS = [
    pytest.param(table, row, id=f"{name}-{row.name}")
    for name, table in KNOWN.tables.items()
    for row in table.rows
]
ENTERING = {"llava-1.5-7b": 576, "llava-next-7b": 2928, "qwen2.5-vl-7b": 1296}


def averaged(table: cli.PublishedTable, row: cli.TableRow) -> float:
    """Return the mean over layers of the tokens processed, as a share of the image's."""
    options = options_from(table.model, [*KNOWN.models[table.model].export, *row.export, "--out", "x"])
    layers, whole = MODELS[table.model].decoder.num_layers, ENTERING[table.model]
    keep = options.encoder_keep or options.token_keep or whole
    entering = int(keep * whole) if keep < 1 else int(keep)
    assert isinstance(options.schedule, ScheduleRequest)
    schedule = options.schedule.schedule(num_layers=layers, num_visual=entering, image_tokens=whole)
    schedule.check_fits(num_layers=layers, max_visual=entering)
    return schedule.average_keep(num_layers=layers, num_visual=entering) * entering / whole


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_every_row_is_an_export_that_fits_its_model(table: cli.PublishedTable, row: cli.TableRow) -> None:
    assert 0.05 < averaged(table, row) <= 1.0
    costs = {"first_tokens_s", "total_s", "flops", "kv_bytes"}
    assert row.published.keys() <= {*table.benchmarks} | costs


@pytest.mark.parametrize(("tokens", "share"), [(192, 192 / 576), (128, 128 / 576), (64, 64 / 576)])
@pytest.mark.parametrize("kind", ["TRIO", "TRIO with encoder stage"])
def test_trios_rows_have_exactly_the_published_average(kind: str, tokens: int, share: float) -> None:
    table = KNOWN.tables["trio-llava-1.5"]
    (row,) = (row for row in table.rows if row.name == f"{kind} {tokens}")
    assert averaged(table, row) == pytest.approx(share, abs=1e-3)


def test_the_system_prompt_stands_where_the_reference_has_it() -> None:
    system = KNOWN.models["llava-1.5-7b"].system
    content = [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]
    messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    text = render_chat(messages, template=VICUNA_TEMPLATE)
    assert text == f"{system} USER: <image>\nIs there a dog? ASSISTANT:"


def test_the_dry_run_prints_exports_builds_and_runs_of_the_harness(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["efficiency-llava-next", "--dry-run", "--row", "TRIO 11.1%", "--backend", "tensorrt"]
    assert main([*asked, "--work", "w", "--limit", "3", "--model", "ck"]) == 0
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("trio-export ck --max-text 512")
    assert first.endswith("--schedule 1:436,10:255,15:173 --out w/ck-trio-11.1")
    assert second == "trio-build w/ck-trio-11.1 --backend tensorrt"
    assert "-m lmms_eval --model trio_edge" in third
    assert '"A chat between a curious user and' in third
    assert third.endswith("--output_path w/ck-trio-11.1--POPE--tensorrt--3 --limit 3")


def test_no_run_takes_the_bundle_or_the_results_of_another_for_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tables, backends, limits = (
        ("efficiency-llava-1.5", "efficiency-llava-next"),
        ("onnxruntime", "tensorrt"),
        "34",
    )
    bundles, results = set(), set()
    for table, backend, limit in itertools.product(tables, backends, limits):
        asked = ["--dry-run", "--work", "w", "--row", "all tokens", "--backend", backend, "--limit", limit]
        assert main([table, *asked]) == 0
        printed = capsys.readouterr().out
        bundles |= {*re.findall(r"--out (\S+)", printed)}
        results |= {*re.findall(r"--output_path (\S+)", printed)}
    assert len(bundles) == len(tables)
    assert len(results) == len(tables) * len(backends) * len(limits)


def test_the_list_has_every_row_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    for table in KNOWN.tables.values():
        assert table.source in printed
        assert all(f"  {row.name}" in printed for row in table.rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TABLE: expected one of trio-llava-1.5,"),
        (["abacus"], "got abacus; see --list"),
        (["trio-refcoco", "--row", "TRIO"], "--row: expected some of all tokens, TRIO 50%"),
        (["trio-refcoco", "--benchmark", "GQA"], "--benchmark: expected some of RefCOCO, got GQA"),
        (["trio-refcoco", "--tables", "none.json"], "--tables none.json: expected a file of tables"),
    ],
)
def test_a_wrong_choice_ends_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_the_harness_nothing_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda _name: None)
    assert main(["trio-refcoco", "--work", str(tmp_path / "w")]) == 2
    assert "run pip install lmms-eval" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


@pytest.fixture
def small(checkpoint: Path, tmp_path: Path) -> list[str]:
    """Arguments for a table of one row on made questions, whose bundle is there already."""
    data = write_questions(tmp_path, [{**line, "images": [line.pop("image")]} for line in questions_about(4)])
    (tmp_path / "local.yaml").write_text(TASK.replace("DATA", str(data)))
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    row = {"name": "TRIO", "export": ["--schedule", "1:14,2:6"], "published": {"made": 50.0, "total_s": 9.0}}
    tables: dict[str, Any] = {
        "benchmarks": {"made": {"task": "trio_edge_local", "metrics": ["exact_match"]}},
        "models": {"m": {"export": [], "system": "w1, w2 w3's"}},
        "tables": {
            "t": {"title": "T", "source": "nobody", "model": "m", "benchmarks": ["made"], "rows": [row]}
        },
    }
    (tmp_path / "tables.json").write_text(json.dumps(tables))
    work = tmp_path / "work"
    work.mkdir()
    schedule = Schedule(stages=(Stage(layer=1, keep=14), Stage(layer=2, keep=6)))
    export(checkpoint, work / "m-trio", schedule=schedule)
    return [
        "t",
        "--tables",
        str(tmp_path / "tables.json"),
        "--work",
        str(work),
        "--json",
        str(tmp_path / "out.json"),
    ]


def test_a_table_goes_through_the_harness_and_stands_next_to_the_published(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert main(small) == 0
    report = json.loads((tmp_path / "out.json").read_bytes())
    (result,) = report["results"]
    assert (result["answers"], result["limit"]) == (4, None)
    assert 0 < result["first_tokens_s"] <= result["total_s"]
    assert result["processed_tokens"] < result["visual_tokens"]
    assert result["flops"] > 1e6
    assert "/ 50" in capsys.readouterr().out
    assert main(small) == 0  # from the folder, without running the harness again
    assert json.loads((tmp_path / "out.json").read_bytes())["results"] == [result]


def test_a_harness_that_fails_is_told_in_one_line(
    small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda _name: True)
    monkeypatch.setattr(cli.sys, "executable", "/bin/false")
    assert main(small) == 2
    assert "TRIO, made: expected results of lmms-eval, got none, code 1" in capsys.readouterr().err


def test_the_harness_knows_every_task() -> None:
    pytest.importorskip("lmms_eval", reason="needs pip install lmms-eval")
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    known = TaskManager(include_path=str(TABLES.parent)).all_tasks
    assert {one.task for one in KNOWN.benchmarks.values()} <= {*known}
    config = load_yaml_config(yaml_path=str(TABLES.parent / "textvqa_val_ocr.yaml"))
    doc = {"question": "what is written ?", "ocr_tokens": ["stop", "42"]}
    asked = config["doc_to_text"](doc, config["lmms_eval_specific_kwargs"]["default"])
    assert asked.splitlines()[1:] == [
        "Reference OCR token: stop, 42",
        "Answer the question using a single word or phrase.",
    ]
