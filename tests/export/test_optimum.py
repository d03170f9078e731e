"""``optimum-cli export trio``: trio-export's options and results, and no harm to optimum's other commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trio_edge.export.cli import command as trio_export
from trio_edge.export.cli import optimum_command as command
from trio_edge.runtime.bundle.errors import install_command

PLUG_IN = Path(__file__).parents[2] / "optimum_plugin" / "register_trio_edge.py"
RUN = """
import sys
sys.modules.update({{name: None for name in {blocked!r}}})
from optimum.commands.optimum_cli import main
sys.argv[0] = "optimum-cli"
main()
"""


def optimum_cli(
    *arguments: object, blocked: tuple[str, ...] = (), path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run optimum's command line where the modules ``blocked`` cannot be imported and ``path`` can be imported from."""
    return subprocess.run(
        [sys.executable, "-c", RUN.format(blocked=blocked), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": "" if path is None else str(path)},
    )


def contents(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in bundle.rglob("*")
        if path.is_file() and path.name != "trio.json"
    }


def test_optimum_writes_the_bundle_that_trio_export_writes(
    checkpoint: Path, keep_all_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimum.commands.optimum_cli import main

    arguments = f"--model {checkpoint} {tmp_path / 'b'} --keep all --max-text 64 --max-new-tokens 40"
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "trio", *arguments.split()])
    with pytest.raises(SystemExit, match=r"^0$"):  # in this process, which has imported torch already
        main()
    assert contents(tmp_path / "b") == contents(keep_all_bundle)
    manifests = [
        json.loads((bundle / "trio.json").read_text()) for bundle in (tmp_path / "b", keep_all_bundle)
    ]
    assert manifests[0] == manifests[1]


def test_options_are_those_of_trio_export_with_model_and_out_in_optimums_way() -> None:
    def options(parameters: list[object]) -> set[str]:
        return {name for parameter in parameters for name in parameter.opts if name.startswith("--")}

    assert options(command.params) - {"--model"} == options(trio_export.params) - {"--out"}
    assert "out" in {parameter.name for parameter in command.params}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nonsense", "no-such-folder"], "nonsense: expected a folder, a Hub id"),
        (["--model", "tiny", "--max-text", "x"], "--max-text"),
        (["--nonsense"], "--nonsense"),
        ([], "expected MODEL"),
    ],
    ids=["unknown_model", "bad_value", "unknown_option", "nothing"],
)
def test_error_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = optimum_cli("export", "trio", *arguments)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("optimum-cli export trio: ")]
    assert message in line
    assert "Traceback" not in result.stderr
    assert "usage" not in result.stderr.lower()


def test_help_is_the_exporters_own() -> None:
    result = optimum_cli("export", "trio", "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: optimum-cli export trio [OPTIONS] [OUT]")
    assert "--schedule LAYER:KEPT" in result.stdout


@pytest.mark.parametrize(
    "blocked",
    [(), ("torch", "transformers", "onnx"), ("trio_edge", "click", "rich")],
    ids=["all_there", "without_the_export_extra", "without_trio_edge"],
)
def test_other_commands_of_optimum_work(blocked: tuple[str, ...]) -> None:
    for arguments in (["--help"], ["export", "--help"]):
        result = optimum_cli(*arguments, blocked=blocked)
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    assert "Export a vision-language model with TRIO token reduction" in result.stdout


def test_two_installations_give_one_command(tmp_path: Path) -> None:
    other = tmp_path / "optimum" / "commands" / "register"
    other.mkdir(parents=True)
    shutil.copy(PLUG_IN, other)
    result = optimum_cli("export", "--help", path=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "{trio}" in result.stdout


def test_missing_packages_are_named_when_the_command_runs(tmp_path: Path) -> None:
    result = optimum_cli("export", "trio", "--model", "tiny", tmp_path / "b", blocked=("torch",))
    assert result.returncode == 2
    assert f"got no torch; {install_command('export')}" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_release_of_optimum_gets_no_command_instead_of_an_error() -> None:
    code = f"""
import runpy, sys
sys.modules["optimum.commands.export.base"] = None
assert list(runpy.run_path({str(PLUG_IN)!r})["REGISTER_COMMANDS"]) == []
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
