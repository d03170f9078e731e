"""A pytest plugin for ``make test-arm``: the tests that need no torch, on another processor with bundles of this one.

``TRIO_EDGE_ARM_BUNDLES`` names a folder. Where torch is installed, the shared bundles that tests ask for are exported as ever
and copied there; where it is not, with ``--noconftest``, tests get these copies.
"""

from __future__ import annotations

import ast
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests.shared_folder import create_shared_folder, remove_shared_folder

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = Path(__file__).parents[2]
BUNDLES = Path(os.environ["TRIO_EDGE_ARM_BUNDLES"])
SHARED = ("keep_all_bundle", "reduced_bundle", "int8_cache_bundle")
# Not on a Jetson, or without wheels for it.
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "av", "tensorrt_rtx"}
HAS_TORCH = find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out test files that import torch and the like, or helpers that do."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_test and needs_torch(collection_path) else None


def needs_torch(file: Path) -> bool:
    """Whether a file of tests imports one of ``HEAVY`` when it is loaded, or the export, or another file of tests that does."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    if any(name.split(".")[0] in HEAVY or name.startswith("trio_edge.export") for name in names):
        return True
    helpers = (ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests."))
    return any(needs_torch(helper) for helper in helpers if helper.is_file())


if HAS_TORCH:

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(fixturedef: Any) -> Generator[None, Any, None]:
        """Copy a shared bundle for the other processor."""
        outcome = yield
        if fixturedef.argname in SHARED:
            shutil.copytree(outcome.get_result(), BUNDLES / fixturedef.argname, dirs_exist_ok=True)

else:
    settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=20)
    settings.load_profile("repeatable")

    def pytest_configure() -> None:
        create_shared_folder()

    def pytest_unconfigure() -> None:
        remove_shared_folder()

    @pytest.fixture(scope="session")
    def keep_all_bundle() -> Path:
        return BUNDLES / "keep_all_bundle"

    @pytest.fixture(scope="session")
    def reduced_bundle() -> Path:
        return BUNDLES / "reduced_bundle"

    @pytest.fixture(scope="session")
    def int8_cache_bundle() -> Path:
        return BUNDLES / "int8_cache_bundle"
