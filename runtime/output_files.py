"""Files that a command writes: checked before its work, and there completely or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trio_edge.runtime.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_outputs(paths: Mapping[str, Path]) -> None:
    """Raise DataError unless a file can be written at each path, and no two are one file; nothing stays there.

    Args:
        paths: Files by the options that name them; those that exist will be replaced.
    """
    named: dict[Path, str] = {}
    for option, path in paths.items():
        _check_output(option, path)
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise DataError(
                f"{option}: expected another file than {other}'s, got {path} for both; rename one"
            )


def _check_output(option: str, path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise DataError(f"{option}: expected a file in an existing folder, got {path}; create the folder")
    if (
        path.exists() or path.is_symlink()
    ) and not path.is_file():  # renaming onto a device would put a file in its place
        raise DataError(f"{option}: expected a file, got {path}, which is none; choose another name")
    try:
        _new_file_beside(path).unlink()
    except OSError as error:
        raise DataError(
            f"{option} {path}: cannot be written ({error.strerror}); choose another folder"
        ) from None


def write_output(option: str, path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path`` and rename it; where that is a link, what it leads to.

    Args:
        option: Its name on the command line.
        path: The file.
        content: All of it.

    Raises:
        DataError: If it cannot be written; what was there stays.
    """
    partial = None
    try:
        partial = _new_file_beside(path)
        partial.write_bytes(content)
        partial.replace(path.resolve())
    except OSError as error:
        raise DataError(
            f"{option} {path}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _new_file_beside(path: Path) -> Path:
    place = path.resolve()
    handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
    os.close(handle)
    partial = Path(name)
    partial.chmod(0o644)  # mkstemp makes it private; a report is an ordinary file
    return partial
