"""The house: one way down, no circles, folders that a newcomer can overlook, one class for one public name."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "runtime": (),
    "trio": ("runtime.bundle",),
    "profiling": ("runtime", "trio"),
    "serving": ("runtime",),
    "export": ("runtime", "trio"),
    "calibration": ("runtime", "trio", "export", "profiling"),
}
"""The packages that each one may import besides itself. contributing/architecture.md says why."""
MOST_ENTRIES = 13
"""Files and folders of one folder, without ``__init__.py`` and ``py.typed``. A reader takes in about twelve."""


@cache
def modules() -> dict[str, Path]:
    """Return the files of the product by module name, as ``runtime.bundle.manifest``."""
    paths = [path for top in MAY_IMPORT for path in sorted((ROOT / top).rglob("*.py"))]
    names = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)
    return dict(zip((name.removesuffix(".__init__") for name in names), paths))


@cache
def imports(name: str) -> frozenset[str]:
    """Return the modules of the product that module ``name`` imports: anywhere in the file, for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {_module(f"{node.module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {_module(alias.name) for alias in node.names}
    return frozenset(found - {"", name})


def _module(imported: str) -> str:
    """Return the module of the product that ``imported``, a module or a name in one, lies in; "" if it is another's."""
    name = imported.removeprefix("trio_edge.") if imported.startswith("trio_edge.") else ""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = (package, *MAY_IMPORT[package])
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if name.split(".")[0] == package
        for other in imports(name)
        if not any(other == place or other.startswith(f"{place}.") for place in allowed)
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter({name: imports(name) for name in modules()}).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_folders_side_by_side_do_not_import_each_other() -> None:
    pairs = {pair for name in modules() for other in imports(name) if (pair := _neighbours(name, other))}
    assert not [f"{one} and {two}" for one, two in sorted(pairs) if one < two and (two, one) in pairs]


def _neighbours(name: str, other: str) -> tuple[str, str] | None:
    """Return the folders of two modules below the last folder that they share; None if one lies directly in it."""
    one, two = name.split("."), other.split(".")
    shared = next((depth for depth, (a, b) in enumerate(zip(one, two)) if a != b), 0)
    if min(len(one), len(two)) < shared + 2:
        return None
    return ".".join(one[: shared + 1]), ".".join(two[: shared + 1])


def test_every_name_imported_from_the_product_is_there() -> None:
    """A renamed module is missed otherwise by what only runs elsewhere: benchmarks, examples, slow tests, lazy imports."""
    users = [
        path
        for top in (*MAY_IMPORT, "tests", "benchmarks", "examples")
        for path in (ROOT / top).rglob("*.py")
    ]
    assert not [
        f"{path.relative_to(ROOT)}:{node.lineno} imports {alias.name} from {node.module}"
        for path in users
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trio_edge")
        for alias in node.names
        if not _is_there(node.module or "", alias.name)
    ]


def _is_there(module: str, name: str) -> bool:
    place = module.removeprefix("trio_edge").removeprefix(".")
    return f"{place}.{name}".strip(".") in _modules_and_folders() or name in _bound_names(place)


@cache
def _modules_and_folders() -> frozenset[str]:
    """Return the modules and what holds them; ``trio`` is a folder without ``__init__.py``."""
    return frozenset(
        ".".join(name.split(".")[:depth]) for name in modules() for depth in range(1, name.count(".") + 2)
    )


@cache
def _bound_names(module: str) -> frozenset[str]:
    """Return what a module defines, assigns or imports, without running it."""
    if module not in modules():
        return frozenset()
    nodes = list(ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))))
    return frozenset(
        [
            node.name
            for node in nodes
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        + [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        + [
            alias.asname or alias.name
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
    )


def test_every_folder_can_be_taken_in_at_a_glance() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *MAY_IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
    )
    entries: dict[Path, set[str]] = defaultdict(set)
    for line in tracked.stdout.splitlines():
        parts = Path(line).parts
        for depth in range(1, len(parts)):
            entries[Path(*parts[:depth])] |= {parts[depth]} - {"__init__.py", "py.typed"}
    assert entries, "expected the files of a git checkout"
    assert not {str(folder): len(names) for folder, names in entries.items() if len(names) > MOST_ENTRIES}


def test_a_public_class_name_means_one_class() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for name, path in modules().items():
        for class_name in _public_classes(path):
            places[class_name].append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def _public_classes(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name


@pytest.mark.parametrize(
    "package", ["runtime", "profiling", "serving", "trio.cost", "trio.budgets", "trio.methods"]
)
def test_every_module_of_the_target_imports_without_torch_transformers_and_onnx(package: str) -> None:
    names = [f"trio_edge.{name}" for name in modules() if f"{name}.".startswith(f"{package}.")]
    if importlib.util.find_spec("ray") is None:  # too large for the tests' own environment
        names = [
            name
            for name in names
            if not name.startswith(("trio_edge.serving.fleet.", "trio_edge.serving.ray_app"))
        ]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
