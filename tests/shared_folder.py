"""Folders that the processes of one test run, and later runs of the same code, share: what takes long is made once."""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_VARIABLE = "TRIO_EDGE_TEST_FOLDER"
_ROOT = Path(__file__).parents[1]
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
_KEPT = Path(os.environ.get("TRIO_EDGE_TEST_TRACES") or _CACHE / "trio-edge" / "test-traces")
"""Outside of the clone, so that a fresh one finds what another has traced."""
_MORE = "TRIO_EDGE_TEST_MORE_TRACES"
"""Names a folder of traces that the tests of a changed copy of this tree may read too."""
_NUM_KEPT = 10
_TRACING_CODE = (
    "trio", "export", "runtime/bundle", "tests/shared_traces.py", "tests/trio/module_digest.py",
    "tests/trio/select_graph.py", "tests/trio/selectors/stage_graph.py", "tests/trio/selectors/token_graph.py",
    "examples/selector_package",
)  # fmt: skip
_TRACING_PACKAGES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "numpy")


def create_shared_folder() -> Path:
    """Create the folder and name it in the environment, which the worker processes inherit."""
    folder = Path(tempfile.mkdtemp(prefix="trio-edge-tests-"))
    os.environ[_VARIABLE] = str(folder)
    return folder


def remove_shared_folder() -> None:
    """Remove the folder with all it holds."""
    shutil.rmtree(os.environ.pop(_VARIABLE), ignore_errors=True)


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """Return the file or folder ``name`` of the shared folder, after the first process that asks has made it.

    Args:
        name: A file name, the same in all processes for the same thing. It may have a suffix.
        make: Writes the file or folder at the path it is given. If it raises, nothing is kept.
    """
    place = Path(os.environ[_VARIABLE]) / name
    with FileLock(place.with_name(f"{name}.lock")):
        if not place.exists():
            unfinished = place.with_name(f"unfinished-{name}")
            make(unfinished)
            unfinished.rename(place)
    return place


def kept_between_runs(name: str, make: Callable[[Path], object]) -> Path:
    """Return the file ``name``, made by the first of all runs with the same tracing code that asks for it.

    Args:
        name: A file name, the same for the same thing.
        make: Writes the file at the path it is given.
    """
    place = traces_of_this_code() / name
    others = Path(os.environ.get(_MORE, place.parent)) / name
    if others.exists():
        return others
    if not place.exists():
        with _without_collection():
            made = made_once(name, make)
        place.parent.mkdir(parents=True, exist_ok=True)
        # Another run may write it too: each writes a file of its own, and the last rename wins.
        unfinished = place.with_name(f"{name}-{os.getpid()}")
        shutil.copyfile(made, unfinished)
        unfinished.replace(place)
    return place


@contextmanager
def _without_collection() -> Iterator[None]:
    """Collect no garbage, which takes a tenth of a trace's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def with_more_traces() -> dict[str, str]:
    """Return the environment of a test run in a copy of this tree to which files were added, so that it finds these traces."""
    return {**os.environ, _MORE: str(traces_of_this_code())}


@functools.cache
def traces_of_this_code() -> Path:
    """Return the folder of what this code has traced; forget what the code of long ago has traced."""
    digest = hashlib.sha256(platform.python_version().encode())
    for package in _TRACING_PACKAGES:
        digest.update(f"{package} {importlib.metadata.version(package)} ".encode())
    for place in (_ROOT / part for part in _TRACING_CODE):
        for path in [place] if place.suffix else sorted(place.rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)} ".encode() + path.read_bytes())
    folder = _KEPT / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    by_last_use = sorted(_KEPT.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in by_last_use[_NUM_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return folder
