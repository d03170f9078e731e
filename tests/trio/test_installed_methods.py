"""Selectors of other packages: a broken one is one line that names its package, and breaks nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest

from trio_edge.export.cli import main
from trio_edge.runtime.bundle.errors import ScheduleError
from trio_edge.trio import methods
from trio_edge.trio.methods import StageMethod, TokenMethod, all_methods, stage_method, token_method

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Install = Callable[..., None]

GOOD = """
from trio_edge.trio.methods import StageMethod
ROW = StageMethod(name="{name}", summary="made up", selector="{module}:Selector", positions="compact", layers=((2,),),
                  flops=lambda *_: 0.0)
"""
TOKENS = """
from trio_edge.trio.methods import TokenMethod
ROW = TokenMethod(name="{name}", summary="made up", selector="{module}:Selector", cost=lambda _: None)
"""
BROKEN = {
    "no_module": ("import a_module_that_is_missing", "ModuleNotFoundError"),
    "syntax": ("ROW = (", "SyntaxError"),
    "leaves": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "no_row": ("OTHER = 1", "AttributeError"),
    "wrong_type": ("ROW = {{'name': '{name}'}}", "a value of type dict, no StageMethod or TokenMethod"),
    "field_unknown": (GOOD.replace("flops", "colour='red', flops"), "TypeError"),
    "field_missing": (GOOD.replace('positions="compact", ', ""), "TypeError"),
    "other_name": (GOOD.replace("{name}", "another"), "other values of name than"),
    "two_lines": (GOOD.replace("made up", "made\\nup"), "other values of summary than"),
    "no_class": (GOOD.replace(":Selector", ""), "other values of selector than"),
    "positions_unknown": (
        GOOD.replace('"compact"', '"kept"'),
        "positions: expected 'compact' or 'preserved', got 'kept'",
    ),
    "layers_descending": (GOOD.replace("((2,),)", "((4, 2),)"), "other values of layers than"),
    "layer_zero": (GOOD.replace("((2,),)", "((0,),)"), "other values of layers than"),
    "layers_flat": (GOOD.replace("((2,),)", "(2,)"), "Type"),
    "formula_is_a_number": (GOOD.replace("lambda *_: 0.0", "0.0"), "other values of flops than"),
    "cost_is_a_number": (TOKENS.replace("lambda _: None", "1"), "other values of cost than"),
}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a package with one module and one entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def installed(name: str, code: str, *, package: str | None = None) -> None:
        module = f"made_up_{(package or name).replace('-', '_')}"
        (tmp_path / f"{module}.py").write_text(code.format(name=name, module=module))
        folder = tmp_path / f"{module}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package or 'package-of-' + name}\nVersion: 1.0\n"
        )
        (folder / "entry_points.txt").write_text(f"[{methods.GROUP}]\n{name} = {module}:ROW\n")
        importlib.invalidate_caches()

    methods._row_of.cache_clear()
    yield installed
    methods._row_of.cache_clear()


def _one_line(error: pytest.ExceptionInfo[ScheduleError], *parts: str) -> None:
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_one_is_refused_by_name_and_others_work(
    name: str, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    name, (code, expected) = name.replace("_", "-"), BROKEN[name]
    install(name, code)
    install("fine", GOOD)
    package = f"package-of-{name}"
    lookup, option = (
        (token_method, "--token-method") if code.startswith(TOKENS[:40]) else (stage_method, "--method")
    )
    with pytest.raises(ScheduleError) as caught:
        lookup(name)
    _one_line(caught, package, expected, "repair or remove")
    assert main(["tiny", option, name]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(
        f"trio-export: {option}: expected a selector {name} from the package {package}, got"
    )
    assert "\n" not in error

    assert stage_method("fine").package == "package-of-fine"
    assert stage_method("trio") is methods.STAGE_METHODS["trio"]
    assert [row.name for row in all_methods(StageMethod)] == [*methods.STAGE_METHODS, "fine"]
    assert main(["--help"]) == 0
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert "fine: made up (selector of the package package-of-fine)" in out
    assert f"the package {package}" in out


@pytest.mark.parametrize("name", ["trio", "divprune"])
def test_a_name_of_ours_stays_ours(name: str, install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install(name, GOOD if name == "trio" else TOKENS)
    row = stage_method(name) if name == "trio" else token_method(name)
    assert row.package == methods.OURS
    assert main(["--list"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if f"package-of-{name}" in line)
    assert f"got a name that {methods.OURS} has, too" in line


def test_a_name_of_two_packages_is_neithers(install: Install) -> None:
    install("twice", GOOD, package="one")
    install("twice", GOOD, package="two")
    with pytest.raises(ScheduleError) as caught:
        stage_method("twice")
    _one_line(caught, "has, too", "one", "two")


def test_a_selector_of_the_other_kind_is_pointed_to_its_option(install: Install) -> None:
    install("inside", GOOD)
    install("before", TOKENS)
    assert isinstance(token_method("before"), TokenMethod)
    with pytest.raises(ScheduleError, match=r"before of the package package-of-before is for --token-method"):
        stage_method("before")
    with pytest.raises(ScheduleError, match=r"inside of the package package-of-inside is for --method"):
        token_method("inside")


def test_a_class_that_is_missing_is_found_when_it_is_loaded(install: Install) -> None:
    install("inside", GOOD)
    with pytest.raises(ScheduleError) as caught:
        stage_method("inside").load()
    _one_line(caught, "package-of-inside", "AttributeError")


def test_entry_points_are_not_read_for_our_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_arguments: object) -> None:
        raise AssertionError("entry points were read")

    monkeypatch.setattr("importlib.metadata.entry_points", refuse)
    for name in methods.STAGE_METHODS:
        stage_method(name).load()
    for name in methods.TOKEN_METHODS:
        token_method(name)
