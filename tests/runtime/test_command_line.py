"""A command's output meets full disks, readers that have gone and plain terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from trio_edge.runtime.cli.console import lookup_option, run

_PRINTS = """
import sys, click
from trio_edge.runtime.cli.console import run
sys.exit(run(click.Command("speak", callback=lambda: print("word " * {count})), []))
"""
_FULL = Path("/dev/full")
CLICKS_ERRORS = (
    ([], "BUNDLE: expected a value, got none; see walk --help"),
    (["B", "C D"], "arguments: expected none after the last one, got C D; put a text with spaces in quotes"),
    (["B", "--steps"], "--steps: expected a value, got none; see walk --help"),
    (["B", "--fast=1"], "--fast: expected no value, got one; see walk --help"),
    (["B", "--steps", "9"], "--steps: expected a number in 1..3, got 9; see walk --help"),
    (["B", "--steps", "two"], "--steps: expected a number, got 'two'; see walk --help"),
    (["B", "--gait", "hop"], "--gait: expected one of 'trot', 'run', got 'hop'; see walk --help"),
    (["B", "--lookup", "few"], "--lookup: expected a number or auto, got 'few'; see walk --help"),
    (["B", "--step", "2"], "--step: expected an option of walk, got another; did you mean --steps?"),
    (["B", "--qqq"], "--qqq: expected an option of walk, got another; see walk --help"),
)


@pytest.mark.parametrize(("arguments", "expected"), CLICKS_ERRORS, ids=lambda value: str(value)[:20])
def test_an_error_that_click_finds_says_where_what_was_expected_and_what_came(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = click.command("walk")(lambda **_given: None)
    command.params = [
        click.Argument(["bundle"]),
        click.Option(["--steps"], type=click.IntRange(1, 3)),
        click.Option(["--fast"], is_flag=True),
        click.Option(["--gait"], type=click.Choice(["trot", "run"])),
    ]
    lookup_option()(command)
    assert run(command, arguments) == 2
    assert capsys.readouterr().err == f"walk: {expected}\n"


COUNTS = pytest.mark.parametrize("count", [1, 100_000], ids=["a line", "more than a buffer"])


@COUNTS
@pytest.mark.skipif(not _FULL.exists(), reason="needs /dev/full; runs on Linux")
def test_a_full_disk_is_one_line(count: int) -> None:
    with _FULL.open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", _PRINTS.format(count=count)],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("speak: expected room for the output")


@COUNTS
def test_a_reader_that_has_gone_is_no_error_message(count: int) -> None:
    command = [sys.executable, "-c", _PRINTS.format(count=count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 1


def test_signs_that_a_terminal_has_not_are_replaced() -> None:
    prints = _PRINTS.format(count=1).replace("word", "2.75×")
    result = subprocess.run(
        [sys.executable, "-c", prints], env={"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False
    )
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, b"2.75?", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such terminals")
@COUNTS
@pytest.mark.parametrize("ignores_it", [False, True], ids=["killed", "under nohup"])
def test_a_terminal_that_hangs_up_ends_a_command_without_a_traceback(count: int, ignores_it: bool) -> None:
    import pty

    waits = _PRINTS.format(count=count).replace("lambda: print", "lambda: sys.stdin.read() or print")
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", waits],
        stdin=subprocess.PIPE, stdout=slave, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_it else signal.SIG_DFL),
    ) as process:  # fmt: skip
        os.close(slave)
        os.close(master)
        if not ignores_it:
            process.send_signal(signal.SIGHUP)
        _, err = process.communicate("")
    if ignores_it:
        assert process.returncode == 2
        assert (
            err
            == "speak: standard output: expected to write to it, got: Input/output error; send it to a file\n"
        )
    else:
        assert (process.returncode, err) == (-signal.SIGHUP, "")
