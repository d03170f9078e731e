"""A folder that all processes of one test run share, so that what takes long is made once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable

_VARIABLE = "TRIO_EDGE_TEST_FOLDER"


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
