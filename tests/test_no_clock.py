"""No test asserts on the clock: a busy machine would fail it. Tests count steps, or bound processor time."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CLOCKS = {"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns"}
"""Functions of the module ``time``. Processor time, which process_time and thread_time read, is another thing."""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_test_asserts_on_the_clock(path: Path) -> None:
    lines = _asserts_on_a_clock(path.read_text(encoding="utf-8"))
    assert not lines, f"{path.relative_to(ROOT)}: count steps instead, or bound processor time"


@pytest.mark.parametrize(
    "code",
    [
        "assert time.time() < 5",
        "begin = time.perf_counter()\nrun()\nassert time.perf_counter() - begin < 5",
        "begin = time.monotonic()\nrun()\ntook = time.monotonic() - begin\nassert took < 5, 'slow'",
        "import time as t\nbegin = t.time()\nrun()\nassert t.time() - begin < 5",
        "from time import perf_counter as tick\nbegin = tick()\nrun()\nassert 0 < tick() - begin < 5",
        "begin: float = time.time()\nseconds = [time.time() - begin for _ in runs]\nassert max(seconds) < 5",
        "def test():\n    self.began = time.time_ns()\n    took = self.began\n    assert took < 5",
        "if (took := time.monotonic() - 3) > 1:\n    pass\nassert took < 5",
        "took = 0.0\ntook += time.time()\nassert took < 5",
        "took = time.time() - begin\nif took > 5:\n    pytest.fail('slow')",
        "took = time.time() - begin\nif took > 5:\n    raise AssertionError('slow')",
        "def seconds():\n    return time.perf_counter() - begin\nassert seconds() < 5",
    ],
)
def test_an_assertion_on_a_clock_is_found(code: str) -> None:
    assert _asserts_on_a_clock(code)


@pytest.mark.parametrize(
    "code",
    [
        "begin = time.process_time()\nrun()\nassert time.process_time() - begin < 5",
        "begin = time.monotonic()\nrun()\nprint(time.monotonic() - begin)\nassert num_steps == 3",
        "def one():\n    took = time.time()\ndef other(took):\n    assert took < 5",
        "assert report.time == 5",
    ],
)
def test_another_assertion_is_not(code: str) -> None:
    assert not _asserts_on_a_clock(code)


def _asserts_on_a_clock(code: str) -> list[int]:
    """Return the lines of all assertions, in any form, on what a clock has read in the same function."""
    tree = ast.parse(code)
    readers = _readers(tree)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    readers |= {function.name for function in functions if _returns_a_reading(function, readers)}
    return sorted({line for scope in (tree, *functions) for line in _lines(scope, readers)})


def _readers(tree: ast.Module) -> set[str]:
    """Return the names of clocks, as the module calls them: ``time.monotonic`` and what the imports rename."""
    modules, names = {"time"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name == "time"}
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            names |= {alias.asname or alias.name for alias in node.names if alias.name in CLOCKS}
    return names | {f"{module}.{clock}" for module in modules for clock in CLOCKS}


def _returns_a_reading(function: ast.FunctionDef | ast.AsyncFunctionDef, readers: set[str]) -> bool:
    read = _readings(function, readers)
    returned = (node.value for node in _own_nodes(function) if isinstance(node, ast.Return) and node.value)
    return any(_holds_a_reading(value, readers, read) for value in returned)


def _lines(scope: ast.AST, readers: set[str]) -> Iterator[int]:
    read = _readings(scope, readers)
    for node in _own_nodes(scope):
        is_check = isinstance(node, ast.Assert) or (isinstance(node, (ast.If, ast.While)) and _fails(node))
        if is_check and _holds_a_reading(node.test, readers, read):
            yield node.lineno


def _fails(node: ast.If | ast.While) -> bool:
    """Say whether a branch of ``node`` ends the test as a failure."""
    parts = [ast.unparse(part) for part in (*node.body, *node.orelse)]
    return any(part.startswith(("pytest.fail(", "raise AssertionError")) for part in parts)


def _readings(scope: ast.AST, readers: set[str]) -> set[str]:
    """Return the variables and attributes that hold what a clock has read, or what comes from it."""
    assignments = [_assignment(node) for node in _own_nodes(scope)]
    read: set[str] = set()
    while True:
        more = {
            name
            for names, value in filter(None, assignments)
            if _holds_a_reading(value, readers, read)
            for name in names
        }
        if more <= read:
            return read
        read |= more


def _assignment(node: ast.AST) -> tuple[list[str], ast.expr] | None:
    if isinstance(node, ast.Assign):
        return [name for target in node.targets for name in _names(target)], node.value
    if isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)) and node.value is not None:
        return _names(node.target), node.value
    return None


def _names(target: ast.expr) -> list[str]:
    if isinstance(target, (ast.Tuple, ast.List)):
        return [name for part in target.elts for name in _names(part)]
    return [ast.unparse(target)]


def _holds_a_reading(value: ast.expr, readers: set[str], read: set[str]) -> bool:
    return any(
        (isinstance(node, ast.Call) and ast.unparse(node.func) in readers)
        or (isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in read)
        for node in ast.walk(value)
    )


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """Return the nodes of ``scope`` without those of functions inside of it, which have variables of their own."""
    for node in ast.iter_child_nodes(scope):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _own_nodes(node)
